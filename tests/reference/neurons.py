"""A feed-forward network that silences neurons by a threshold from mean and deviation; NumPy and SciPy, no JAX."""

import numpy as np
from scipy.stats import norm

from reference.moe import gelu


def statistical_top_k(z: np.ndarray, share: float) -> np.ndarray:
    """One vector: what is above mean + deviation · Φ⁻¹(1 − share), less that."""
    mean = sum(z) / len(z)
    deviation = (sum((value - mean) ** 2 for value in z) / len(z)) ** 0.5
    threshold = mean + deviation * norm.ppf(1 - share)
    return np.array([max(value - threshold, 0) for value in z])


def feed_forward(
    x: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, w_gate: np.ndarray | None, share: float
) -> tuple[np.ndarray, float]:
    """(output of one token, share of its neurons that are active)."""
    z = x @ (w_in if w_gate is None else w_gate)
    sparse = statistical_top_k(z, share)
    hidden = gelu(sparse) if w_gate is None else gelu(sparse) * (x @ w_in)
    return hidden @ w_out, float(np.mean(sparse > 0))
