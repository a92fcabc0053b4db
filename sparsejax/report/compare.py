"""Where two runs part: the first step, layer and token at which what they wrote differs.

Times differ always and are not compared. Everything else is compared exactly: runs that are to be the same are."""

import math
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from sparsejax.report.differences import config_differences
from sparsejax.report.runs import Run

TIMES = frozenset({"seconds", "step_seconds", "tokens_per_second", "data_wait_fraction"})


def compare(a: Run, b: Run) -> list[str]:
    """What to print: differing settings, then the first row, counts and token in which the runs part."""
    differs = config_differences([a.saved, b.saved])
    lines = [f"{a.name} | {b.name}"]
    lines += [f"config.{key}: {left.text} ({left.source or 'unknown'}) | {right.text} ({right.source or 'unknown'})"
              for key, (left, right) in differs.items()] or ["config: the same"]  # fmt: skip
    found = {"metrics": first_row(a, b), "routing": first_counts(a, b), "passages": first_token(a, b)}
    return [*lines, *(f"{name}: {told}" for name, told in found.items())]


def first_row(a: Run, b: Run) -> str:
    """Of the rows that both have."""
    rows = [{(row["step"], row["split"]): row for row in run.rows} for run in (a, b)]
    both = sorted(rows[0].keys() & rows[1].keys(), key=lambda key: (key[0], key[1] != "train"))
    for step, split in both:
        left, right = rows[0][step, split], rows[1][step, split]
        keys = [key for key in {**left, **right} if key not in TIMES and left.get(key) != right.get(key)]
        if keys:
            worst = keys[: 3 if len(keys) > 4 else 4]
            told = "; ".join(f"{key} {left.get(key)} | {right.get(key)}" for key in worst)
            more = f"; {len(keys) - len(worst)} more" if len(keys) > len(worst) else ""
            return f"first part at step {step} ({split}): {told}{more}"
    return _same("rows", len(both), both[-1][0] if both else None)


def first_counts(a: Run, b: Run) -> str:
    """Of `routing/`: the first step, and of it the first layer."""
    both = _both(a, b, "routing")
    for step in both:
        left, right = a.arrays("routing", step), b.arrays("routing", step)
        for layer in _layers(left, right):
            fields = _parting(left, right, layer)
            if fields:
                return f"first part at step {step}, layer {layer}: {_counts(layer, fields[0], left, right)}"
    return _same("steps", len(both), both[-1] if both else None)


def first_token(a: Run, b: Run) -> str:
    """Of `passages/`: the first step, and of it the first token in reading order, in the lowest layer."""
    both = _both(a, b, "passages")
    for step in both:
        left, right = a.arrays("passages", step), b.arrays("passages", step)
        if _shape(left) != _shape(right) or not np.array_equal(left["tokens"], right["tokens"]):
            return f"step {step}: the passages are not the same text"
        places = {key: place for key in sorted({*left, *right}) if (place := _place(left, right, key)) is not None}
        missing = sorted(set(left) ^ set(right))
        if places:
            # Reading order first; at one token layers before its loss, which follows from them.
            key = min(places, key=lambda key: (places[key], "/" not in key, key))
            row, token = places[key]
            values = " | ".join(str(np.asarray(each[key])[row, token].tolist()) for each in (left, right))
            layer, _, field = key.rpartition("/")
            where = f"layer {layer}, " if layer else ""
            token_id = left["tokens"][row, token]
            return f"first part at step {step}, {where}row {row}, token {token} (id {token_id}): {field} {values}"
        if missing:
            return f"step {step}: only one run has {missing[0]}"
    return _same("steps", len(both), both[-1] if both else None)


def _both(a: Run, b: Run, folder: str) -> list[int]:
    return sorted(set(a.steps(folder)) & set(b.steps(folder)))


def _same(what: str, count: int, last: Optional[int]) -> str:
    return "nothing that both runs have" if last is None else f"the same in all {count} {what}, to step {last}"


def _layers(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> list[str]:
    return sorted({key.partition("/")[0] for key in (*left, *right)})


def _parting(left: Mapping[str, Any], right: Mapping[str, Any], layer: str) -> list[str]:
    """Integer counts first: a sum of floats follows from them, or parts by rounding."""
    keys = [key for key in {**left, **right} if key.partition("/")[0] == layer]
    keys.sort(key=lambda key: key in left and left[key].dtype.kind == "f")
    return [key for key in keys if key not in left or key not in right or not _equal(left[key], right[key])]


def _counts(layer: str, key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    field = key.removeprefix(f"{layer}/")
    if key not in left or key not in right:
        return f"only one run has {field}"
    one, two = np.ravel(left[key]), np.ravel(right[key])
    if one.shape != two.shape:
        return f"{field} has {one.size} | {two.size} values"
    place = int(np.flatnonzero(_unequal(one, two))[0])
    return f"{field}[{place}] {one[place].item()} | {two[place].item()}"


def _place(left: Mapping[str, Any], right: Mapping[str, Any], key: str) -> Optional[tuple[int, int]]:
    """(row, token) of the first difference in an array by token."""
    rows, length = left["tokens"].shape
    if any(key not in each or each[key].shape[:2] != (rows, length) for each in (left, right)):
        return None
    if left[key].shape != right[key].shape:
        return 0, 0
    differs = _unequal(left[key], right[key]).reshape(rows, length, -1).any(-1)
    return divmod(int(differs.argmax()), length) if differs.any() else None


def _shape(arrays: Mapping[str, Any]) -> Any:
    return arrays["tokens"].shape if "tokens" in arrays else math.nan


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and not _unequal(one, two).any()


def _unequal(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """NaN equals NaN: there is no loss in either."""
    both = (one != one) & (two != two) if one.dtype.kind == two.dtype.kind == "f" else False
    return np.asarray((one != two) & ~np.asarray(both))
