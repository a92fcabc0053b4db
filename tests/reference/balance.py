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


def of_groups(chosen: list[list[int]], p: np.ndarray, k: int, groups: int) -> float:
    """Σ_i f′_i P′_i: a group's mean of f_e = E / (k T) · pairs of e, times its sum of P_e (arXiv:2401.06066)."""
    tokens, num_experts = p.shape
    each, value = num_experts // groups, 0.0
    for group in range(groups):
        members = range(group * each, (group + 1) * each)
        f = [num_experts / k / tokens * sum(experts.count(e) for experts in chosen) for e in members]
        value += sum(f) / each * sum(p[s, e] for s in range(tokens) for e in members) / tokens
    return value


def of_communication(chosen: list[list[int]], p: np.ndarray, groups: int) -> float:
    """Σ_i f″_i P″_i: f″_i = D / (M T) · tokens with an expert in group i, M being the mean number of groups of a token
    (arXiv:2405.04434, where M is the most), times the group's sum of P_e."""
    tokens, num_experts = p.shape
    each, value = num_experts // groups, 0.0
    sent = [{e // each for e in experts} for experts in chosen]
    mean = sum(map(len, sent)) / tokens
    for group in range(groups):
        f = groups / mean / tokens * sum(group in of_token for of_token in sent)
        value += f * sum(p[s, e] for s in range(tokens) for e in range(num_experts) if e // each == group) / tokens
    return value


def with_free_experts(chosen: list[list[int]], p: np.ndarray, k: int, free: int, weight: float) -> float:
    """Σ_e η_e f_e P_e, η_e being `weight` for the last `free` experts and 1 for the others (arXiv:2410.07348), over its
    value where f_e η_e are all alike and P_e = f_e / k: 1 there."""
    tokens, num_experts = p.shape
    eta = [weight if e >= num_experts - free else 1.0 for e in range(num_experts)]
    value = 0.0
    for e in range(num_experts):
        f = sum(experts.count(e) for experts in chosen) / tokens
        value += eta[e] * f * sum(p[s, e] for s in range(tokens)) / tokens
    wanted = [k / n / sum(1 / m for m in eta) for n in eta]
    return value / sum(n * f * f / k for n, f in zip(eta, wanted, strict=True))
