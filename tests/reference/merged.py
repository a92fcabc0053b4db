"""Experts merged in parameter space (SMEAR, arXiv:2306.03745; Lory, arXiv:2405.03133), segment by segment; NumPy
float64 and no JAX."""

import numpy as np

from reference.moe import feed_forward


def softmax(logits):
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def forward(x, mask, router, w_in, w_out, segment, first):
    """(y, p of every segment) of one row. `segment` None: the row decides for itself. `first`: 'uniform' or 'own'."""
    x = x.astype(np.float64)
    size = len(x) if segment is None else segment
    starts = range(0, len(x), size)
    logits = []
    for start in starts:
        tokens = [t for t in range(start, min(start + size, len(x))) if mask[t]]
        mean = sum((x[t] for t in tokens), np.zeros(x.shape[1])) / max(len(tokens), 1)
        logits.append(mean @ router.astype(np.float64))
    y, probabilities = np.zeros_like(x), []
    for n, start in enumerate(starts):
        if segment is None or (n == 0 and first == "own"):
            used = logits[n]
        else:
            used = logits[n - 1] if n > 0 else np.zeros_like(logits[0])
        p = softmax(used)
        probabilities.append(p)
        merged_in, merged_out = (sum(p[e] * w[e].astype(np.float64) for e in range(len(p))) for w in (w_in, w_out))
        for t in range(start, min(start + size, len(x))):
            if mask[t]:
                y[t] = feed_forward(x[t], merged_in, merged_out)
    return y, probabilities
