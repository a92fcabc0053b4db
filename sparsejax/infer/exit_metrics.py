"""What early exits cost and what they are worth: curves over thresholds, fronts, and what goes wrong on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsejax.infer.exit_rules import ExitRule, leave
from sparsejax.infer.exit_table import ExitTable

Exits = Int[np.ndarray, " N"]


@dataclass(frozen=True, kw_only=True)
class ExitSummary:
    """Means over the examples of a table, each at its own exit."""

    accuracy: float
    loss: float  # nats
    depth: float  # layers run: E[D]
    cost: float  # FLOPs
    saved: float  # 1 − cost / the full model's
    agreement: float  # with the full model's predictions
    histogram: tuple[int, ...]  # examples of every exit


def at_exit(values: np.ndarray, exits: Exits) -> np.ndarray:
    """What a column of the table, `[N, E]` or `[E]`, holds at each example's exit."""
    return values[exits] if values.ndim == 1 else np.take_along_axis(values, exits[:, None], axis=1)[:, 0]


def summary(table: ExitTable, exits: Exits) -> ExitSummary:
    """What becomes of a table's examples that leave there. Raises `ValueError` where there are none."""
    if not len(table):
        raise ValueError("a table without examples has no means")
    cost = float(at_exit(table.cost, exits).mean())
    return ExitSummary(
        accuracy=float(at_exit(table.correct, exits).mean()),
        loss=float(at_exit(table.loss, exits).mean(dtype=np.float64)),
        depth=float(at_exit(table.depth, exits).mean()),
        cost=cost,
        saved=1 - cost / float(table.cost[-1]),
        agreement=float((at_exit(table.prediction, exits) == table.prediction[:, -1]).mean()),
        histogram=tuple(np.bincount(exits, minlength=table.exits).tolist()),
    )


def sweep(table: ExitTable, rules: Sequence[ExitRule], first: int = 0) -> list[ExitSummary]:
    """One summary for every rule, such as one rule at several thresholds."""
    return [summary(table, leave(rule, table, first)) for rule in rules]


def pareto_front(cost: Float[np.ndarray, " P"], quality: Float[np.ndarray, " P"]) -> Int[np.ndarray, " F"]:
    """Indices of the points that no other has at no more cost with no less quality, the cheapest first; of points that
    are alike, the first."""
    front, best = [], -np.inf
    for i in np.lexsort((np.arange(len(cost)), -np.asarray(quality), cost)):
        if quality[i] > best:
            front.append(int(i))
            best = quality[i]
    return np.asarray(front, np.int64)


def pareto_area(cost: Float[np.ndarray, " P"], quality: Float[np.ndarray, " P"], low: float, high: float) -> float:
    """The mean, over log FLOPs from `low` to `high`, of the best quality to be had at that cost or less. Raises
    `ValueError` unless a point costs no more than `low` and low < high."""
    front = pareto_front(cost, quality)
    cost, quality = np.asarray(cost, np.float64)[front], np.asarray(quality, np.float64)[front]
    if not 0 < low < high or cost[0] > low:
        raise ValueError(f"no area from {low:g} to {high:g} FLOPs: the cheapest point costs {cost[0]:g}")
    edges = np.log(np.clip(np.append(cost, high), low, high))
    return float((np.diff(edges) * quality).sum() / np.log(high / low))


def oracle_exits(table: ExitTable) -> Exits:
    """The first exit that is right, and the first of all where none is: the most that any rule could save."""
    return np.argmax(table.correct, axis=1)


def oracle_gap(table: ExitTable, exits: Exits) -> float:
    """How much more accurate it would be to leave at a right exit wherever there is one."""
    return float(table.correct.any(1).mean() - at_exit(table.correct, exits).mean())


def overthinking(table: ExitTable) -> float:
    """The share of examples that some earlier exit has right and the full model wrong (Shallow-Deep Networks,
    arXiv:1810.07052)."""
    return float((table.correct[:, :-1].any(1) & ~table.correct[:, -1]).mean())


def calibration_error(confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int = 15) -> float:
    """Expected calibration error: |accuracy − mean confidence| of bins of equal width, weighted by their examples
    (arXiv:1706.04599)."""
    place = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=correct - np.asarray(confidence, np.float64), minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def monotonicity_gap(quality: Float[np.ndarray, "N E"]) -> Float[np.ndarray, " N"]:
    """How far below an earlier exit an example's quality ever falls, 0 where it never does: for the probability of the
    target, exp(−loss), conditional monotonicity is that this is 0 (arXiv:2306.02652)."""
    return (np.maximum.accumulate(quality, axis=1) - quality).max(1)
