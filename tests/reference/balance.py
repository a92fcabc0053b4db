"""Balance terms from the equations, token by token, in NumPy float64."""

import math

import numpy as np


def squared_variation(values: np.ndarray) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / (mean**2 + 1e-10)


def load_by_chance(clean: np.ndarray, noisy: np.ndarray, deviation: np.ndarray, k: int, others: bool) -> np.ndarray:
    """[S, E]: P(e is chosen by s), its noise being drawn anew. The threshold is the k-th best of the `others`
    (arXiv:1701.06538), or of all (arXiv:2106.05974)."""
    found = np.zeros(clean.shape)
    for s, e in np.ndindex(*clean.shape):
        rivals = [noisy[s, i] for i in range(clean.shape[1]) if i != e or not others]
        threshold = sorted(rivals, reverse=True)[k - 1]
        found[s, e] = 0.5 * math.erfc(-(clean[s, e] - threshold) / deviation[s, e] / math.sqrt(2))
    return found


def gates(scores: np.ndarray, k: int) -> np.ndarray:
    """[S, E]: scores of the k best over their sum, 0 elsewhere."""
    found = np.zeros(scores.shape)
    for s, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda e: -row[e])[:k]
        for e in best:
            found[s, e] = row[e] / sum(row[b] for b in best)
    return found


def entropy(p: np.ndarray) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def entropies(p: np.ndarray, least: float) -> tuple[float, float]:
    """(mean entropy of a token, entropy that all tokens together lack) (arXiv:2206.02770)."""
    return sum(map(entropy, p)) / len(p), max(0.0, math.log(least) - entropy(p.mean(0)))
