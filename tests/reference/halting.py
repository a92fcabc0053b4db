"""Halting, one token at a time, from the papers' equations in plain Python."""

import math
from collections.abc import Sequence


def act(probabilities: Sequence[float], epsilon: float) -> tuple[list[float], int, float]:
    """(weights, N, R): N is the first n with Σ_{i ≤ n} h_i > 1 − ε or the last one, R = 1 − Σ_{i < N} h_i."""
    n = 1
    while n < len(probabilities) and sum(probabilities[:n]) <= 1 - epsilon:
        n += 1
    remainder = 1 - sum(probabilities[: n - 1])
    return [*probabilities[: n - 1], remainder, *[0.0] * (len(probabilities) - n)], n, remainder


def ponder_distribution(logits: Sequence[float]) -> list[float]:
    left, found = 1.0, []
    for logit in logits[:-1]:
        rate = 1 / (1 + math.exp(-logit))
        found.append(left * rate)
        left *= 1 - rate
    return [*found, left]
