"""Capacity-limited token-choice routing, from GShard (arXiv:2006.16668, Algorithm 1) and Switch (arXiv:2101.03961).

One token, one choice, one expert at a time, in NumPy float64. Slow on purpose, free of JAX: the library is held to it.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Routing:
    """Of one group. `weights` are 0 where a pair is dropped or its token is padding."""

    experts: np.ndarray  # [S, K]
    positions: np.ndarray  # [S, K], -1 for padding
    kept: np.ndarray  # [S, K]
    weights: np.ndarray  # [S, K]
    probabilities: np.ndarray  # [S, E], scores over their sum
    logits: np.ndarray  # [S, E]
    assigned: np.ndarray  # [E]
    processed: np.ndarray  # [E]
    slots: np.ndarray  # [E, C]: choice * S + token of the pair in the slot, -1 where empty


def capacity(tokens: int, num_experts: int, k: int, numerator: int, denominator: int, per_choice: bool) -> int:
    """⌈CF · tokens · (k) / E⌉ for CF = numerator / denominator, in whole numbers."""
    top = numerator * tokens * (k if per_choice else 1)
    return min(tokens, -(-top // (denominator * num_experts)))


def peer_capacity(name: str, tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Slots as the code of the library `name` computes them, floats and all."""
    share = tokens / num_experts
    return {
        "per_choice": lambda: math.ceil(share * k * factor),
        "per_token": lambda: math.ceil(share * factor),
        "mesh_tf": lambda: max(min(tokens, int(share * factor)), 4),
        "flaxformer": lambda: max(round(factor * tokens / num_experts), 4),
        "axlearn": lambda: int(tokens * factor / num_experts),
        "praxis": lambda: (int(share * factor) + 3) // 4 * 4,
        "vmoe": lambda: math.ceil(math.ceil(share * k * factor) / 4) * 4,
        "megablocks": lambda: int(factor * k * tokens / num_experts),
        "olmo_core": lambda: (int(factor * k * tokens / num_experts) + 7) // 8 * 8,
        "tutel": lambda: k * int(factor * math.ceil(share)),
        "maxtext": lambda: int(max(math.ceil(tokens * k / num_experts) * factor, factor)),
        "deepspeed": lambda: max(math.ceil(share * factor * k), 4),
        "torchscale": lambda: int(factor * math.ceil(share)) if k == 1 else 2 * math.ceil(share),
    }[name]()


def fill(pairs: list[tuple[int, bool]], num_experts: int, limit: int) -> tuple[list[int], list[bool]]:
    """(position, kept) of each (expert, valid) pair: first come, first served. An invalid pair has position -1."""
    taken = [0] * num_experts
    positions, kept = [], []
    for expert, valid in pairs:
        positions.append(taken[expert] if valid else -1)
        kept.append(valid and taken[expert] < limit)
        taken[expert] += valid
    return positions, kept


def score(logits: np.ndarray, kind: str) -> np.ndarray:
    """[E] scores of one token."""
    if kind == "sigmoid":
        return np.array([1 / (1 + math.exp(-v)) for v in logits])
    if kind == "sqrt_softplus":
        return np.array([math.sqrt(math.log1p(math.exp(v))) for v in logits])
    if kind == "relu":
        return np.array([max(v, 0.0) for v in logits])
    if kind != "softmax":
        raise ValueError(f"no equation for the score {kind!r} has been written down here")
    exponentials = [math.exp(v - max(logits)) for v in logits]
    return np.array(exponentials) / sum(exponentials)


def route(
    logits: np.ndarray, mask: np.ndarray, *, k: int, kind: str, weight: str, limit: int, num_slots: int, free: int = 0
) -> Routing:
    """Routes one group. `weight` is 'raw', or 'before' / 'after' for renormalisation before or after the drop. The
    last `free` experts keep every pair, without slots."""
    size, num_experts = logits.shape
    scores = np.stack([score(row.astype(np.float64), kind) for row in logits])
    experts = np.array([sorted(range(num_experts), key=lambda e: (-scores[s, e], e))[:k] for s in range(size)])
    order = [(s, c) for c in range(k) for s in range(size)]  # every first choice before any second
    positions, kept = np.full((size, k), -1), np.zeros((size, k), bool)
    with_slots = num_experts - free
    wants = [(experts[s, c], bool(mask[s]) and experts[s, c] < with_slots) for s, c in order]
    filled = fill(wants, num_experts, limit)
    slots = np.full((with_slots, num_slots), -1)
    assigned, processed = np.zeros(num_experts, int), np.zeros(num_experts, int)
    for (s, c), position, keep in zip(order, *filled, strict=True):
        positions[s, c], kept[s, c] = position, keep
        assigned[experts[s, c]] += bool(mask[s])
        if mask[s] and experts[s, c] >= with_slots:
            kept[s, c] = True
            processed[experts[s, c]] += 1
        if keep:
            processed[experts[s, c]] += 1
            slots[experts[s, c], position] = c * size + s
    return Routing(
        experts=experts,
        positions=positions,
        kept=kept,
        weights=_weights(scores, experts, kept, weight),
        probabilities=scores / scores.sum(-1, keepdims=True),
        logits=logits,
        assigned=assigned,
        processed=processed,
        slots=slots,
    )


def _weights(scores: np.ndarray, experts: np.ndarray, kept: np.ndarray, weight: str) -> np.ndarray:
    weights = np.zeros(experts.shape)
    for s, chosen in enumerate(experts):
        selected = scores[s, chosen]
        total = {"raw": 1.0, "before": selected.sum(), "after": selected[kept[s]].sum()}[weight]
        for c in range(len(chosen)):
            if kept[s, c]:
                weights[s, c] = selected[c] / total
    return weights


def balance(assigned: np.ndarray, probabilities: np.ndarray, k: int) -> float:
    """E/k · Σ_e f_e P_e over the tokens whose probabilities are given: 1 when balanced."""
    tokens, num_experts = probabilities.shape
    value = 0.0
    for e in range(num_experts):
        value += assigned[e] / tokens * probabilities[:, e].mean()
    return num_experts / k * value
