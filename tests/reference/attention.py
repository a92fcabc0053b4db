"""Attention, rotary positions and cross-entropy by loops, NumPy float64, no JAX."""

import math
from typing import Optional

import numpy as np


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Each pair (i, i + H/2) of features is turned by position · θ^(−2i/H) (arXiv:2104.09864). x [B, T, N, H]."""
    out, half = np.array(x, np.float64), x.shape[-1] // 2
    for b, t, n, i in np.ndindex(*x.shape[:3], half):
        angle = positions[b, t] * theta ** (-2 * i / x.shape[-1])
        left, right = float(x[b, t, n, i]), float(x[b, t, n, i + half])
        out[b, t, n, i] = left * math.cos(angle) - right * math.sin(angle)
        out[b, t, n, i + half] = left * math.sin(angle) + right * math.cos(angle)
    return out


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segments: np.ndarray,
    soft_cap: Optional[float] = None,
    causal: bool = True,
) -> np.ndarray:
    """Within a segment. q [B, T, N, H]; k and v [B, T, M, H]; query head n reads key head n // (N / M)."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        m = n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(t + 1 if causal else q.shape[1]) if segments[b, s] == segments[b, t]]
        logits = np.array([q[b, t, n].astype(np.float64) @ k[b, s, m] / math.sqrt(q.shape[-1]) for s in seen])
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for weight, s in zip(weights, seen, strict=True):
            out[b, t, n] += weight * v[b, s, m]
    return out


def cross_entropy_sum(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """Σ over unmasked positions of −log softmax(logits)[target], nats."""
    total = 0.0
    for index in np.ndindex(*targets.shape):
        if mask[index]:
            row = logits[index].astype(np.float64)
            total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[targets[index]]
    return total
