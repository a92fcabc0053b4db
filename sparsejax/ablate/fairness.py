"""Unfair pairs: what else differs between arms that are said to differ in one thing."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.ablate.arms import Resolved
from sparsejax.ablate.study import Study
from sparsejax.base.config import diff
from sparsejax.base.errors import RequestError
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.optimizer import learning_rate_at
from sparsejax.train.record import FREE

DATA_ORDER = ("data.", "train.seed")
DENOMINATOR = ("data.task", "model.head")
EVALUATION = ("eval.batches",)
FRACTIONS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Unfair:
    """One way in which an arm and the base do not compare."""

    kind: str  # one of study.UNFAIR
    arm: str
    text: str

    def __str__(self) -> str:
        return f"{self.arm}: {self.kind}: {self.text}"


def unfair(study: Study, arms: Mapping[str, Resolved]) -> list[Unfair]:
    """What the configs tell, before anything has run."""
    base, found = arms[study.base], []
    for name, arm in arms.items():
        if name == study.base:
            continue
        differs = [(key, before, now) for key, before, now in diff(base.config, arm.config)]
        named = lambda *prefixes: [_said(*each) for each in differs if _under(each[0], prefixes)]  # noqa: E731
        for kind, prefixes in (("denominator", DENOMINATOR), ("evaluation", EVALUATION)):
            found += [Unfair(kind, name, text) for text in named(*prefixes)]
        order = [
            _said(*each)
            for each in differs
            if each[0].startswith(DATA_ORDER) and not each[0].startswith((*FREE, *DENOMINATOR))
        ]
        found += [Unfair("data_order", name, text) for text in order]
        apart = _schedule_distance(base.config, arm.config)
        if apart > 0.01:
            text = f"at the same fraction of the run the learning rate is up to {apart:.0%} of the peak apart"
            found.append(Unfair("schedule", name, text))
        known = (*study.varies, *arm.sized, *DATA_ORDER, *DENOMINATOR, *FREE)
        found += [Unfair("axes", name, _said(*each)) for each in differs if not _under(each[0], known)]
    return found


def unfair_runs(base: Path, run: Path, arm: str) -> list[Unfair]:
    """What two finished runs tell: what their evaluations counted, and by which convention FLOPs."""
    (first, before), (second, now) = _last_evaluation(base), _last_evaluation(run)
    found = []
    for name in ("targets", "padding_fraction"):
        if before.get(name) != now.get(name):
            text = f"{name} of the evaluation was {now.get(name)}, not {before.get(name)}"
            found.append(Unfair("denominator", arm, text))
    for which, text in (("corpus", "evaluation"), ("flops_convention", "flops")):
        if first[which] is None or first[which] != second[which]:  # what is not recorded is not known to be equal
            found.append(Unfair(text, arm, f"{which} is {second[which]}, not {first[which]}"))
    return found


def refuse(found: Iterable[Unfair], allowed: Iterable[str]) -> list[Unfair]:
    """What is flagged. Raises `RequestError` on the first that is not allowed."""
    found, allowed = list(found), set(allowed)
    wrong = [each for each in found if each.kind not in allowed]
    if wrong:
        more = "" if len(wrong) == 1 else f" (and {len(wrong) - 1} more)"
        advice = "name the key in Study.varies" if wrong[0].kind == "axes" else f"allow={wrong[0].kind!r} flags it"
        raise RequestError(f"unfair: arm {wrong[0]}{more}; {advice}")
    return found


def _under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether `key` is one of them or in one of these groups."""
    return any(key == prefix.rstrip(".") or key.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def _said(key: str, before: Any, now: Any) -> str:
    return f"config.{key} is {now!r}, not {before!r}"


def _schedule_distance(base: ExperimentConfig, arm: ExperimentConfig) -> float:
    """Largest difference of the two schedules at equal fractions of their runs, as a share of each one's peak.

    Two runs of different lengths take their steps at different fractions: within one step nothing counts as apart."""
    curves = []
    for config in (base, arm):
        rate, steps = learning_rate_at(config.optimizer, config.train.steps), config.train.steps
        values = np.array(
            [[np.asarray(rate(step)) if step >= 0 else 0 for step in _near(fraction, steps)] for fraction in FRACTIONS]
        )
        curves.append(values / max(values.max(), 1e-30))
    (low, high), (least, most) = ((curve.min(axis=1), curve.max(axis=1)) for curve in curves)
    return float(np.maximum(low - most, least - high).max())


def _near(fraction: float, steps: int) -> list[int]:
    """The step at a fraction of the run and its neighbours, −1 for before the first."""
    step = round(fraction * (steps - 1))
    return [min(step + shift, steps - 1) for shift in (-1, 0, 1)]


def _last_evaluation(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the run depended on, its last row of evaluation)."""
    environment = json.loads((run / "config.json").read_text())["environment"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    corpus = environment.get("corpus", {})
    recorded = {"corpus": corpus.get("hash"), "flops_convention": environment.get("flops_convention")}
    return recorded, [row for row in rows if row["split"] == "eval"][-1]
