"""Soft MoE (arXiv:2308.00951), slot by slot and token by token; NumPy float64 and no JAX."""

import numpy as np

from reference.moe import feed_forward


def forward(x, mask, phi, scale, w_in, w_out):
    """(y, dispatch, combine) of one row: x [T, D], mask [T], φ [D, E, P], experts [E, …]."""
    x = x.astype(np.float64)
    tokens, (_, experts, slots) = [t for t in range(len(x)) if mask[t]], phi.shape
    logits = np.zeros((len(x), experts, slots))
    for t in tokens:
        for e in range(experts):
            for p in range(slots):
                column = phi[:, e, p].astype(np.float64)
                norms = np.sqrt((x[t] @ x[t] + 1e-6) * (column @ column + 1e-6))
                logits[t, e, p] = scale * (x[t] @ column) / norms
    dispatch, combine, y = np.zeros_like(logits), np.zeros_like(logits), np.zeros_like(x)
    for t in tokens:
        combine[t] = np.exp(logits[t]) / np.exp(logits[t]).sum()
        for e in range(experts):
            for p in range(slots):
                dispatch[t, e, p] = np.exp(logits[t, e, p]) / sum(np.exp(logits[s, e, p]) for s in tokens)
    for e in range(experts):
        for p in range(slots):
            z = sum((dispatch[t, e, p] * x[t] for t in tokens), np.zeros(x.shape[1]))
            out = feed_forward(z, w_in[e].astype(np.float64), w_out[e].astype(np.float64))
            for t in tokens:
                y[t] += combine[t, e, p] * out
    return y, dispatch, combine
