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


def mixture_of_recursions(x, block, scores, valid, slots, kind):
    """One row of Mixture-of-Recursions (arXiv:2507.10524), by expert choice: in recursion r the `slots[r]` best of the
    tokens that recursion r − 1 computed on. `block(x, places)` of chosen tokens, `scores(x, r)` of a row's states.
    Returns (the row after the last recursion, which tokens each recursion computed on)."""
    alive, chosen_of = valid.copy(), []
    for r, k in enumerate(slots):
        found = scores(x, r)
        chosen = best(found, alive, k)
        gate, y = gate_of(kind, found, alive), x.copy()
        contribution = block(x[chosen], chosen) - x[chosen]
        for place, t in enumerate(chosen):
            y[t] = x[t] + gate[t] * contribution[place]
        x, alive = y, np.isin(np.arange(len(x)), chosen)
        chosen_of.append(alive)
    return x, np.array(chosen_of)
