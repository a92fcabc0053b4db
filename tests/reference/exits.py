"""Exit rules, example by example and exit by exit as a decoder would meet them, in plain Python."""

import math
from collections.abc import Sequence

import numpy as np


def softmax(row: Sequence[float]) -> list[float]:
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


def entropy(p: Sequence[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = lambda x: sum(a * math.log(a / b) for a, b in zip(x, m, strict=True) if a > 0)  # noqa: E731
    return (kl(p) + kl(q)) / 2


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def leave(
    rule: str, logits: np.ndarray, states: np.ndarray, scores: np.ndarray, setting: float, patience: int = 1
) -> int:
    """Where one example with `[E, C]` logits, `[E, D]` states and `[E]` scores leaves."""
    count, before, going = 0, None, 1.0
    for exit, row in enumerate(logits):
        p = softmax(row)
        ordered, label = sorted(p, reverse=True), int(np.argmax(row))
        if rule == "patience":
            count = count + 1 if before is not None and label == int(np.argmax(before)) else 0
            stop = count >= patience
        elif rule == "similarity_patience":
            count = count + 1 if before is not None and jensen_shannon(p, softmax(before)) < setting else 0
            stop = count >= patience
        elif rule == "state_similarity":
            stop = exit > 0 and cosine(states[exit], states[exit - 1]) >= setting
        elif rule == "q_exit":
            going *= 1 - scores[exit]
            stop = 1 - going > setting
        else:
            stop = {
                "max_prob": ordered[0] >= setting,
                "margin": ordered[0] - ordered[1] >= setting,
                "entropy": entropy(p) < setting,
                "normalised": entropy(p) / math.log(len(p)) < setting,
                "learned": scores[exit] >= setting,
            }[rule]
        if stop:
            return exit
        before = row
    return len(logits) - 1
