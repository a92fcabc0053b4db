"""What a study is: the object `STUDY` of a file `experiments/NAME.py`."""

import itertools
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from sparsejax.base.errors import RequestError, did_you_mean

EQUAL = ("active_flops", "total_parameters", "tokens", "wall_time", "step_time")
"""What arms can be made equal in. FLOPs are those of the whole training, ideal (the ledger's convention); tokens those
seen in it; wall time and step time are measured, all arms in turn, before the runs."""

UNFAIR = ("data_order", "schedule", "denominator", "evaluation", "flops", "axes")
"""Kinds of unfair pairs, each of which a study may allow; they are then flagged on its page."""

TRAIN = "train/"
"""Before the name of a figure: that of the last row of training, not of evaluation."""

Figures = dict[str, float]
"""Of one run, by name."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of doing it: the study's config with an argument, with edits, or both."""

    argument: Optional[str] = None  # of the config file: FILE.py:argument
    edits: Mapping[str, Any] = field(default_factory=dict)  # config key → value, as after --config.KEY=
    edit: Optional[Callable[[Any], object]] = None  # is given the ConfigDict and changes it (a preset, say)
    size: Optional[str] = None  # the key that is solved to match the base; None: the study's
    multiple: int = 1  # what the solved value is a multiple of
    begin: Optional[str] = None  # the arm whose run of the same seed it begins with
    exploratory: bool = False  # gets no verdict


SEQUENCES = {
    **dict.fromkeys(("varies", "allow", "shown", "notes"), (str,)),
    "seeds": (int,),
    "budgets": (int, float),
}
"""Fields of a study that are tuples, and what of."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are compared with one of them, the base, and what is held equal between them.

    Raises `RequestError` when its parts contradict each other.
    """

    question: str  # one sentence: the title of its page
    config: str  # the base config, relative to the folder above that of the study's file
    arms: Mapping[str, Arm]
    base: str
    equal: str = "active_flops"  # one of EQUAL
    varies: tuple[str, ...] = ()  # config keys (or the groups above them) that arms may differ in; others are refused
    size: Optional[str] = None  # config key that is solved to make an arm equal; None: arms must be equal as they are
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "bits_per_byte"  # of the evaluation rows in metrics.jsonl
    higher_is_better: bool = False
    deviation: Optional[float] = None  # of the metric between seeds, if known before: for the power stated beforehand
    effect: Optional[float] = None  # the smallest difference of the metric that would matter: arms of which the runs
    # tell neither that they differ nor that they do so by less are exploratory
    budgets: tuple[float, ...] = ()  # the base is also trained for so many times its steps: for effective speed-ups
    allow: tuple[str, ...] = ()  # kinds of unfair pairs (UNFAIR) that are flagged and not refused
    shown: tuple[str, ...] = ()  # further figures of the last evaluation for the page's table
    figures: Optional[Callable[[Path], Figures]] = None  # more figures of a finished run, from its folder
    together: Optional[Callable[[Mapping[str, Path]], Mapping[str, Figures]]] = None
    """Of one seed, arm → folder of its finished run: more figures by arm, found of all at once, as times in turn are.
    Names that are no arm's are variants: ways to use a trained arm, which have a table of their own."""
    scatter: Optional[tuple[str, str]] = None  # figures by which arms and variants are drawn: across, and up
    timed: bool = False  # measure a training step of each arm, after the runs, in turn with the base
    notes: tuple[str, ...] = ()  # sentences for the page: what the arms are
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # --scale=NAME → edits of every arm

    def __post_init__(self):
        for name, kind in SEQUENCES.items():
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(type(each) in kind for each in value):
                allowed = " or ".join(each.__name__ for each in kind)
                raise RequestError(f"{name}={value!r}; allowed: a tuple of {allowed}")
        for name, arm in self.arms.items():
            if not isinstance(arm, Arm):
                raise RequestError(f"arm {name!r} is {arm!r}; allowed: an Arm")
        if self.base not in self.arms:
            raise RequestError(f"base={self.base!r} is no arm; arms: {', '.join(self.arms)}")
        if len(self.arms) < 2:
            raise RequestError(f"a study compares at least two arms; arms: {', '.join(self.arms)}")
        if self.equal not in EQUAL:
            raise RequestError(f"equal={self.equal!r}; allowed: {', '.join(EQUAL)}.{did_you_mean(self.equal, EQUAL)}")
        for kind in self.allow:
            if kind not in UNFAIR:
                raise RequestError(f"allow={kind!r}; allowed: {', '.join(UNFAIR)}.{did_you_mean(kind, UNFAIR)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RequestError(f"seeds={self.seeds}: at least one, each once")
        if self.arms[self.base].exploratory:
            raise RequestError(f"base={self.base!r} is exploratory; it is what the others are compared with")
        for name in ("deviation", "effect"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RequestError(f"{name}={value!r}; allowed: None, or more than 0, in the metric's unit")
        if any(budget <= 0 or budget == 1 for budget in self.budgets):
            raise RequestError(f"budgets={self.budgets}: positive, and not 1, which is the base itself")
        for name, arm in self.arms.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
                raise RequestError(f"arm {name!r}: a name has letters, digits and _ . + - (it is a folder's)")
            before = list(self.arms)[: list(self.arms).index(name)]
            if arm.begin is not None and arm.begin not in before:
                raise RequestError(f"arm {name}: begin={arm.begin!r} is no arm before it; those: {', '.join(before)}")

    def edits_of(self, scale: Optional[str]) -> tuple[tuple[str, str], ...]:
        """As overrides of every arm's config. Raises `RequestError` on a scale that there is not."""
        if scale is None:
            return ()
        if scale not in self.scales:
            known = ", ".join(self.scales) or "none"
            raise RequestError(f"--scale={scale}: no such scale; those: {known}.{did_you_mean(scale, self.scales)}")
        return tuple((key, as_text(value)) for key, value in self.scales[scale].items())


def pod(without: Sequence[str] = ()) -> dict[str, Any]:
    """A scale for studies of models of two kinds of layers: the shape of a pretraining run of 8 chips. `without` those
    keys that are an arm's own."""
    edits = {
        "model.d_model": 768,
        "model.num_heads": 12,
        "model.repeats": 6,
        "model.scan": True,
        "data.sequence_length": 1024,
        "data.batch_size": 256,
        "train.steps": 20000,
        "optimizer.learning_rate": 6e-4,
        "optimizer.schedule.warmup_steps": 1000,
        "mesh.data": 8,
    }
    return {key: value for key, value in edits.items() if key not in without}


def as_text(value: Any) -> str:
    """As after `--config.KEY=`."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def grid(argument: Optional[str] = None, **axes: Mapping[str, Mapping[str, Any]]) -> dict[str, Arm]:
    """Arms for every combination: each axis maps a word to config edits, and an arm's name is its words, with dashes.

    grid(k={"k1": {KEY: 1}, "k2": {KEY: 2}}, capacity={"c1": {…}, "c2": {…}})     # k1-c1, k1-c2, k2-c1, k2-c2
    """
    arms = {}
    for words in itertools.product(*axes.values()):
        edits: dict[str, Any] = {}
        for word, axis in zip(words, axes.values(), strict=True):
            edits |= axis[word]
        arms["-".join(words)] = Arm(argument=argument, edits=edits)
    return arms


def load_study(path: Path) -> Study:
    """The `STUDY` of a Python file. Raises `RequestError` where there is none, or it does not run."""
    if path.suffix != ".py" or not path.is_file():
        raise RequestError(f"{path}: no such study; a study is a Python file that defines STUDY")
    try:
        study = runpy.run_path(str(path)).get("STUDY")
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except Exception as error:  # the code of a study may raise anything
        raise RequestError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(study, Study):
        raise RequestError(f"{path}: defines no STUDY, a sparsejax.ablate.Study")
    return study


def chosen(study: Study, arms: Optional[Sequence[str]], seeds: Optional[Sequence[int]]) -> Study:
    """The study with fewer arms or other seeds. The base, and what an arm begins with, stay.

    Raises `RequestError` on an arm that there is not."""
    if arms is not None:
        unknown = next((arm for arm in arms if arm not in study.arms), None)
        if unknown is not None:
            raise RequestError(
                f"--arms={unknown}: no such arm; those: {', '.join(study.arms)}.{did_you_mean(unknown, study.arms)}"
            )
        begun = {study.arms[arm].begin for arm in arms}
        kept = {name: arm for name, arm in study.arms.items() if name in {*arms, *begun, study.base}}
        study = replace(study, arms=kept)
    return study if seeds is None else replace(study, seeds=tuple(seeds))
