"""The share of the layers' work that a batch of documents spends, token by token and pair by pair; NumPy and no JAX."""

import numpy as np


def flops_share(begins: np.ndarray, ends: np.ndarray, segments: np.ndarray, work: list[tuple]) -> float:
    """`begins` and `ends` `[L, B, T]`: each token's weight at and after attention; `work`: of each layer (a token that
    is there, a pair, a token after attention)."""
    spent = whole = 0.0
    for weight, after, (before, pair, last) in zip(begins, ends, work, strict=True):
        for b, t in zip(*np.nonzero(segments), strict=True):
            others = np.flatnonzero(segments[b] == segments[b, t])
            spent += before * weight[b, t] + last * after[b, t]
            spent += pair * sum(weight[b, t] * weight[b, s] for s in others)
            whole += before + last + pair * len(others)
    return spent / whole


def kl_of_depths(kept: np.ndarray, depth: float, deviation: float) -> float:
    """Of tokens left after n of L layers, to a normal density about depth · L; `kept` `[L]` are shares of all."""
    layers = len(kept)
    reached = [1.0, *kept, 0.0]
    p = [reached[n] - reached[n + 1] for n in range(layers + 1)]
    prior = np.exp([-0.5 * ((n - depth * layers) / deviation) ** 2 for n in range(layers + 1)])
    prior /= prior.sum()
    return sum(a * np.log(a / b) for a, b in zip(p, prior, strict=True) if a > 0)
