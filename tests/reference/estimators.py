"""Expectations over discrete choices by counting all of them, in NumPy float64, and optima by root finding."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


def expectation_over_gates(loss: Callable[[tuple[int, ...]], float], logits: Sequence[float]) -> float:
    """E f(z) over all 2ⁿ settings of independent gates."""
    return sum(_probability(z, logits) * loss(z) for z in itertools.product((0, 1), repeat=len(logits)))


def gradient_over_gates(loss: Callable[[tuple[int, ...]], float], logits: Sequence[float]) -> np.ndarray:
    """d E f(z) / dθ_i = Σ_z p(z) f(z) (z_i − σ(θ_i)), by counting."""
    found = np.zeros(len(logits))
    for z in itertools.product((0, 1), repeat=len(logits)):
        for i, theta in enumerate(logits):
            found[i] += _probability(z, logits) * loss(z) * (z[i] - _sigmoid(theta))
    return found


def gradient_over_choice(losses: Sequence[float], logits: Sequence[float]) -> np.ndarray:
    """d Σ_i p_i f_i / dθ for p = softmax(θ)."""
    e = [math.exp(v - max(logits)) for v in logits]
    p = [v / sum(e) for v in e]
    mean = sum(a * b for a, b in zip(p, losses, strict=True))
    return np.array([a * (b - mean) for a, b in zip(p, losses, strict=True)])


def relaxed_gate(
    slope: Callable[[np.ndarray], np.ndarray], theta: float, temperature: float, hard: bool
) -> tuple[float, float]:
    """(mean, deviation) over logistic noise of f'(gate) · dy/dθ with y = σ((θ + noise) / τ), the gate being y or y
    rounded: by the midpoint rule."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    y = 1 / (1 + np.exp(-(theta + np.log(u / (1 - u))) / temperature))
    each = slope(np.round(y) if hard else y) * y * (1 - y) / temperature
    return each.mean(), each.std()


def soft_top_k(scores: np.ndarray, k: float, epsilon: float) -> np.ndarray:
    """λ_i = min(1, exp((s_i + a) / ε)) with the a at which they add up to k, by bisection."""
    low, high = -max(scores) - 50 * epsilon - 50, -min(scores) + 1e-9
    for _ in range(200):
        a = (low + high) / 2
        low, high = (a, high) if np.minimum(1, np.exp((scores + a) / epsilon)).sum() < k else (low, a)
    return np.minimum(1, np.exp((scores + low) / epsilon))


def _probability(z: tuple[int, ...], logits: Sequence[float]) -> float:
    return math.prod(_sigmoid(t) if on else 1 - _sigmoid(t) for on, t in zip(z, logits, strict=True))


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))
