"""Who is selected, one token and one expert at a time; NumPy and no JAX. Each returns the (token, expert) pairs of one
group as a set, or in order where the order is the point."""

import math

import numpy as np


def best(ranking: np.ndarray, k: int) -> list[list[int]]:
    """The k best experts of each token; ties go to the lower expert."""
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in ranking]


def top_k(ranking: np.ndarray, k: int) -> set[tuple[int, int]]:
    return {(s, e) for s, experts in enumerate(best(ranking, k)) for e in experts}


def second_expert(scores: np.ndarray, taken) -> set[tuple[int, int]]:
    """Top-2 in which `taken(g2)` says whether the second is; g2 is its share of both scores."""
    pairs = set()
    for s, (first, second) in enumerate(best(scores, 2)):
        pairs.add((s, first))
        if taken(scores[s, second] / (scores[s, first] + scores[s, second])):
            pairs.add((s, second))
    return pairs


def prototypes(scores: np.ndarray, k: int) -> set[tuple[int, int]]:
    each = scores.shape[1] // k
    return {
        (s, z * each + int(np.argmax(row[z * each : (z + 1) * each]))) for s, row in enumerate(scores) for z in range(k)
    }


def top_p(scores: np.ndarray, p: float, k: int) -> set[tuple[int, int]]:
    pairs = set()
    for s, experts in enumerate(best(scores, k)):
        reached = 0.0
        for e in experts:
            if reached >= p:
                break
            pairs.add((s, e))
            reached += scores[s, e] / scores[s].sum()
    return pairs


def positive(scores: np.ndarray, k: int) -> set[tuple[int, int]]:
    return {(s, e) for s, e in top_k(scores, k) if scores[s, e] > 0}


def mix(left: int, right: int, seed: int) -> int:
    """A hash of two numbers, in whole numbers modulo 2³²."""
    word = 0xFFFFFFFF

    def finalise(value: int) -> int:
        value = ((value ^ (value >> 16)) * 0x85EBCA6B) & word
        value = ((value ^ (value >> 13)) * 0xC2B2AE35) & word
        return value ^ (value >> 16)

    return finalise((finalise(left ^ seed) * 0x9E3779B1 + right) & word)


def hash_experts(token: int, num_experts: int, k: int, seed: int) -> list[int]:
    """The k experts with the largest hash of (token, expert)."""
    return sorted(range(num_experts), key=lambda e: -mix(token, e, seed))[:k]


def expert_choice(scores: np.ndarray, mask: np.ndarray, limit: int) -> set[tuple[int, int]]:
    """Each expert's `limit` best unmasked tokens; ties go to the earlier token."""
    real = np.flatnonzero(mask)
    return {(int(s), e) for e in range(scores.shape[1]) for s in sorted(real, key=lambda s: (-scores[s, e], s))[:limit]}


def capped_plan(
    scores: np.ndarray, slots: float, cap: int, temperature: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(plan [S, E], what each token costs) by Dykstra's projections on A ≤ 1, Σ_e A ≤ cap, Σ_s A = slots in turn
    (arXiv:2202.09368)."""
    size, num_experts = scores.shape
    plan = np.exp(scores / temperature)
    over, price = np.ones_like(plan), np.ones(size)
    for _ in range(rounds):
        for s, e in np.ndindex(size, num_experts):
            before = plan[s, e] * over[s, e]
            plan[s, e] = min(before, 1)
            over[s, e] = before / plan[s, e]
        for s in range(size):
            before = plan[s] * price[s]
            price[s] = max(before.sum() / cap, 1)
            plan[s] = before / price[s]
        for e in range(num_experts):
            plan[:, e] *= slots / plan[:, e].sum()
    return plan, temperature * np.log(price)


def group_limited(ranking: np.ndarray, groups: int, kept: int, best_of: int) -> np.ndarray:
    """`ranking` with −inf outside each token's best groups."""
    limited = np.full_like(ranking, -np.inf)
    each = ranking.shape[1] // groups
    for s, row in enumerate(ranking):
        rank = [sum(sorted(row[g * each : (g + 1) * each])[-best_of:]) for g in range(groups)]
        for g in sorted(range(groups), key=lambda g: (-rank[g], g))[:kept]:
            limited[s, g * each : (g + 1) * each] = row[g * each : (g + 1) * each]
    return limited


def order(pairs: list[tuple[int, int, int]], kind: str, scores: np.ndarray) -> list[tuple[int, int, int]]:
    """(token, choice, expert) triples of one group in the order in which they ask for slots."""
    keys = {
        "choice_major": lambda s, c, e: (c, s),
        "token_major": lambda s, c, e: (s, c),
        "priority": lambda s, c, e: (c, -scores[s].max(), s),
        "by_score": lambda s, c, e: (-scores[s, e], c, s),
    }
    return sorted(pairs, key=lambda triple: keys[kind](*triple))


def quantile_step(bias: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Bias after one dual step on one group: −β, β_e being the (kS/E + 1)-th largest of s − α, with mean 0."""
    size, num_experts = scores.shape
    alpha = np.array([sorted(row + bias, reverse=True)[k] for row in scores])
    beta = np.array([sorted(scores[:, e] - alpha, reverse=True)[k * size // num_experts] for e in range(num_experts)])
    return -beta - (-beta).mean()


def soft_clamped_step(
    bias: list[float], speed: list[float], load: list[int], rate: float, momentum: float, sharpness: float
) -> tuple[list[float], list[float]]:
    """(bias, its speed) after one step with these loads (arXiv:2602.17004)."""
    mean = sum(load) / len(load)
    clamped = [math.tanh(sharpness * (mean - n) / mean) for n in load]
    speed = [momentum * v + (1 - momentum) * c for v, c in zip(speed, clamped, strict=True)]
    moved = [b + rate * v for b, v in zip(bias, speed, strict=True)]
    return [b - sum(moved) / len(moved) for b in moved], speed


def next_best(ranking: np.ndarray, mask: np.ndarray, limit: int, rounds: int) -> tuple[list[int], list[bool]]:
    """Top-1 where who finds its expert full asks, round by round, the best expert that had free slots when the round
    began; (expert, whether it got a slot) of each token, the first choice where it got none."""
    size, num_experts = ranking.shape
    choice = [best(ranking[s : s + 1], 1)[0][0] for s in range(size)]
    served, free = [False] * size, [limit] * num_experts
    for number in range(rounds + 1):
        is_open = [number == 0 or slots > 0 for slots in free]
        for s in range(size):
            candidates = [e for e in range(num_experts) if is_open[e] and np.isfinite(ranking[s, e])]
            if served[s] or not mask[s] or not candidates:
                continue
            wanted = max(candidates, key=lambda e: (ranking[s, e], -e))
            if free[wanted] > 0:
                served[s], choice[s] = True, wanted
                free[wanted] -= 1
    return choice, served


def bigram_experts(token: int, previous: int, num_experts: int, k: int, seed: int) -> list[int]:
    """As `hash_experts` of the hash of both ids; `previous` is −1 at the start of a document."""
    return hash_experts(mix(token, previous + 1, seed), num_experts, k, seed)


def balanced_table(counts: list[int], num_experts: int, k: int) -> list[list[int]]:
    """Ids from the most frequent on, each to the k least loaded experts, then those with fewest ids, then the lower."""
    load, ids, table = [0] * num_experts, [0] * num_experts, [[] for _ in counts]
    for token in sorted(range(len(counts)), key=lambda t: (-counts[t], t)):
        table[token] = sorted(range(num_experts), key=lambda e: (load[e], ids[e], e))[:k]
        for e in table[token]:
            load[e] += counts[token]
            ids[e] += 1
    return table


def pressed(scores: np.ndarray, k: int) -> float:
    """Σ_e f_e · (mean score of e) over the tokens of one unit, f_e = E/k times its positive scores per token."""
    tokens, num_experts = scores.shape
    value = 0.0
    for e in range(num_experts):
        chosen = sum(1 for s in range(tokens) if scores[s, e] > 0)
        value += num_experts / k * chosen / tokens * sum(scores[s, e] for s in range(tokens)) / tokens
    return float(value)


def above(scores: np.ndarray, thresholds: np.ndarray, most: int) -> set[tuple[int, int]]:
    """Every expert above its threshold, of them each token's `most` best by margin."""
    found = set()
    for s, row in enumerate(scores):
        margin = row - thresholds
        best = sorted((e for e in range(len(row)) if margin[e] > 0), key=lambda e: (-margin[e], e))
        found |= {(s, e) for e in best[:most]}
    return found


def upper_quantile(scores: np.ndarray, k: int) -> np.ndarray:
    """[E]: each expert's (kS/E + 1)-th largest score."""
    size, num_experts = scores.shape
    return np.array([sorted(scores[:, e], reverse=True)[k * size // num_experts] for e in range(num_experts)])


def counts_by_expert(tokens, decisions, vocab_size: int, num_experts: int) -> list[list[int]]:
    """[V, E]: how often each id went to each expert; −1 is none."""
    counts = [[0] * num_experts for _ in range(vocab_size)]
    for token, experts in zip(tokens, decisions, strict=True):
        for e in experts:
            if token >= 0 and e >= 0:
                counts[token][e] += 1
    return counts
