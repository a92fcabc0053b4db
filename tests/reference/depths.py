"""Mixture-of-Depths (arXiv:2404.02258), token by token."""

import numpy as np


def best(scores, valid, k):
    """The k valid tokens with the highest scores, by place; of equal ones the first."""
    candidates = [t for t in range(len(scores)) if valid[t]]
    candidates.sort(key=lambda t: (-scores[t], t))
    return sorted(candidates[:k])


def gate_of(kind, scores, valid):
    scores = scores.astype(np.float64)
    if kind == "raw":
        return scores
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-scores))
    if kind == "softmax":
        weights = np.where(valid, np.exp(scores - scores.max()), 0)
        return weights / weights.sum()
    return np.ones_like(scores)


def mixture_of_depths(x, block, scores, valid, k, kind):
    """One row: `block` of the chosen tokens and their places → what becomes of them, skip connection included."""
    chosen, gate, y = best(scores, valid, k), gate_of(kind, scores, valid), x.copy()
    contribution = block(x[chosen], chosen) - x[chosen]
    for place, t in enumerate(chosen):
        y[t] = x[t] + gate[t] * contribution[place]
    return y
