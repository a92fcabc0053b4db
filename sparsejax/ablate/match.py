"""Arms made equal to the base in one respect, by solving for one whole number of their config."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsejax.ablate.arms import Overrides, Resolved, resolve, tokens, training_flops
from sparsejax.ablate.study import Arm, Study
from sparsejax.base.config import leaves
from sparsejax.base.errors import RequestError, did_you_mean
from sparsejax.model.cost import total
from sparsejax.train.config import ExperimentConfig

TOLERANCE = 0.01
"""How far an arm may be from the base, as a share."""
STEPS, WARMUP = "train.steps", "optimizer.schedule.warmup_steps"

Measure = Callable[[ExperimentConfig], float]

BY_LEDGER: dict[str, Measure] = {
    "active_flops": training_flops,
    "total_parameters": lambda config: float(total(config.model).parameters),
    "tokens": tokens,
}
"""Measures that need no run."""
SPENT = ("active_flops", "tokens", "wall_time")
"""Measures to which the run that an arm begins with adds its own."""


def matched(study: Study, root: Path, overrides: Overrides, measure: Measure) -> dict[str, Resolved]:
    """All arms, each within `TOLERANCE` of the base by `measure`; sized where it has a key to solve and needs it. Those
    that are exploratory stay as they are.

    Raises:
      RequestError: an arm cannot be matched; the line names the pair and the nearest that there is.
    """
    as_they_are = {name: resolve(study, root, name, overrides) for name in study.arms}
    _check_keys(study, as_they_are)

    def before(arm: Arm) -> float:
        return 0.0 if arm.begin is None or study.equal not in SPENT else measure(as_they_are[arm.begin].config)

    base = study.arms[study.base]
    goal, found = measure(as_they_are[study.base].config) + before(base), {}
    for name, arm in study.arms.items():
        as_it_is, key, rest = as_they_are[name], arm.size or study.size, goal - before(arm)
        if rest <= 0 and not arm.exploratory:
            raise RequestError(
                f"arms {name} and {study.base} cannot be matched: {arm.begin}, which {name} begins with, has spent "
                f"{before(arm) / goal:.3f} of the base's {study.equal}"
            )
        if arm.exploratory or _close(measure(as_it_is.config), rest):
            found[name] = as_it_is
        elif key is None:
            raise RequestError(
                f"arms {name} and {study.base} cannot be matched: {study.equal} is "
                f"{measure(as_it_is.config) / rest:.3f} of the base's, and neither Study.size nor Arm.size names a key"
            )
        else:
            found[name] = _solved(study, root, name, overrides, measure, rest, key, as_it_is)
    return found


def _check_keys(study: Study, arms: Mapping[str, Resolved]) -> None:
    """Raises `RequestError` for a key of the study that is none of any arm's."""
    keys = {name: leaves(arm.config) for name, arm in arms.items()}
    known = {key for its in keys.values() for key in its}
    groups = {key[:place] for key in known for place, letter in enumerate(key) if letter == "."}
    for name, its in keys.items():
        size = study.arms[name].size
        if size is not None and size not in its:
            raise RequestError(f"arm {name}: size={size!r} is no key of its config.{did_you_mean(size, its)}")
    if study.size is not None and study.size not in known:
        raise RequestError(f"size={study.size!r} is no key of any arm's config.{did_you_mean(study.size, known)}")
    for key in study.varies:
        if key.rstrip(".") not in known | groups:
            raise RequestError(f"varies={key!r} is no key of any arm's config.{did_you_mean(key, known | groups)}")


def _close(value: float, goal: float) -> bool:
    return abs(value / goal - 1) <= TOLERANCE


def _solved(
    study: Study, root: Path, name: str, overrides: Overrides, measure: Measure, goal: float, key: str, begun: Resolved
) -> Resolved:
    """The arm whose value of `key` brings it nearest: doubled or halved until the goal lies between, then bisected."""
    values = leaves(begun.config)
    if key not in values or type(values[key]) not in (int, type(None)):  # None: derived, d_ff from d_model, say
        raise RequestError(f"arm {name}: {key} is {values.get(key)!r}; what is solved for is a whole number")
    multiple, tried = study.arms[name].multiple, {}

    def at(units: int) -> float:
        if units not in tried:
            arm = resolve(study, root, name, overrides, _sized(key, units * multiple, begun))
            tried[units] = (measure(arm.config), arm)
        return tried[units][0]

    low = high = max(1, round((values[key] or 1) / multiple))
    grows = at(low) <= at(low + 1)  # more experts a token, say, or fewer repeats
    below = lambda units: (at(units) < goal) == grows  # noqa: E731
    while below(high) and high < 2**40:
        low, high = high, 2 * high
    while low > 1 and not below(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if below(middle) else (low, middle)
    units = min(tried, key=lambda units: abs(tried[units][0] - goal))
    value, arm = tried[units]
    if not _close(value, goal):
        raise RequestError(
            f"arms {name} and {study.base} cannot be matched within {TOLERANCE:.0%}: the nearest is "
            f"{key}={units * multiple}, where {study.equal} is {value / goal:.3f} of the base's"
        )
    return arm


def _sized(key: str, value: int, arm: Resolved) -> dict[str, Any]:
    """What is set: another number of steps keeps the share of them that is warm-up."""
    values = leaves(arm.config)
    if key != STEPS or WARMUP not in values or not values[WARMUP]:
        return {key: value}
    return {key: value, WARMUP: max(1, round(values[WARMUP] * value / arm.config.train.steps))}


def at_budget(study: Study, root: Path, overrides: Overrides, times: float) -> Resolved:
    """The base, trained for so many times its steps, with as large a share of warm-up."""
    base = resolve(study, root, study.base, overrides)
    sized = _sized(STEPS, max(1, round(base.config.train.steps * times)), base)
    return resolve(study, root, study.base, overrides, sized)
