"""Halting, one token at a time, from the papers' equations in plain Python and NumPy float64, no JAX."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


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


def layers(
    x: np.ndarray,
    blocks: Sequence[Callable[[np.ndarray, np.ndarray], np.ndarray]],
    probabilities: Sequence[Callable[[np.ndarray], float]],
    segments: np.ndarray,
    rule: Callable[[list[float], bool], tuple[float, bool]],
    visible: bool,
) -> tuple[np.ndarray, np.ndarray, list[list[list[float]]], np.ndarray]:
    """(output [B, T, D], layers run [B, T], halting probabilities by token, weight of the last step [B, T]).

    `blocks`: (states, segments) → states; `rule`: (probabilities so far, last layer) → (weight, whether it halts). A
    token that has halted keeps its state, which others see or do not."""
    rows, length = segments.shape
    x, output, depth, last = x.copy(), np.zeros(x.shape), np.zeros((rows, length), int), np.zeros((rows, length))
    seen: list[list[list[float]]] = [[[] for _ in range(length)] for _ in range(rows)]
    running = segments > 0
    for number, (block, probability) in enumerate(zip(blocks, probabilities, strict=True)):
        y = block(x, segments if visible else np.where(running, segments, 0))
        for b, t in np.argwhere(running):
            x[b, t] = y[b, t]
            depth[b, t] += 1
            seen[b][t].append(probability(x[b, t]))
            weight, halts = rule(seen[b][t], number == len(blocks) - 1)
            output[b, t] += weight * x[b, t]
            if halts:
                running[b, t], last[b, t] = False, weight
    return output, depth, seen, last


def act_rule(epsilon: float) -> Callable[[list[float], bool], tuple[float, bool]]:
    """Of a token that still runs: h_n, or R = 1 − Σ_{i < n} h_i where Σ_{i ≤ n} h_i exceeds 1 − ε."""

    def rule(h: list[float], last: bool) -> tuple[float, bool]:
        halts = last or sum(h) > 1 - epsilon
        return (1 - sum(h[:-1]) if halts else h[-1]), halts

    return rule


def quantile_rule(quantile: float) -> Callable[[list[float], bool], tuple[float, bool]]:
    """Of evaluation with PonderNet's distribution: all of the weight where more than this part has halted."""

    def rule(h: list[float], last: bool) -> tuple[float, bool]:
        halts = last or 1 - float(np.prod([1 - each for each in h])) > quantile
        return float(halts), halts

    return rule


def halting_distribution(seen: Any, depth: int) -> np.ndarray:
    """[L]: the mean halting probability of the tokens at each layer, 1 at the last, made to add up to 1 (A-ViT)."""
    total = np.zeros(depth)
    for h in (h for row in seen for h in row):
        for number, each in enumerate(h):
            total[number] += 1 if number == depth - 1 else each
    return total / total.sum()
