"""Exit rules by name: which exit each example of an exit table leaves at.

Every rule looks at one example alone, at the exits up to the one that it decides about. Who never stops leaves at the
last, the full model. Where a rule compares with `threshold`, it may be one number or one for every exit."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.infer.exit_table import ExitTable, log_softmax

Threshold = float | tuple[float, ...]


NEVER = 2**30
"""An exit that no model has."""


class ExitRule(Protocol):
    @property
    def earliest(self) -> int:
        """Number of the first exit at which it could stop, whatever the table."""
        ...

    def stops(self, table: ExitTable) -> Bool[np.ndarray, "N E"]:
        """Where each example would be content."""
        ...


def leave(rule: ExitRule, table: ExitTable, first: int = 0) -> Int[np.ndarray, " N"]:
    """The index of each example's exit: the first from number `first` on at which the rule stops, else the last."""
    stops = np.array(rule.stops(table))
    stops[:, :first] = False
    stops[:, -1] = True
    return np.argmax(stops, axis=1)


@dataclass(frozen=True, kw_only=True)
class AtLeast:
    """Stops where a confidence in [0, 1] is `threshold` or more. 1 is never reached, also where a probability rounds to
    it; 0 leaves at the first exit."""

    threshold: Threshold = 0.9

    def __post_init__(self):
        if not all(0 <= t <= 1 for t in np.atleast_1d(self.threshold)):
            raise ConfigError("threshold", f"{self.threshold} is outside [0, 1]")

    @property
    def earliest(self) -> int:
        reached = [exit for exit, threshold in enumerate(np.atleast_1d(self.threshold)) if threshold < 1]
        return reached[0] if reached else NEVER

    def confidence(self, table: ExitTable) -> Float[np.ndarray, "N E"]:
        raise NotImplementedError

    def stops(self, table: ExitTable) -> Bool[np.ndarray, "N E"]:
        threshold = _of_exits(self.threshold, table)
        return (self.confidence(table) >= threshold) & (threshold < 1)


@dataclass(frozen=True, kw_only=True)
class MaxProb(AtLeast):
    """The probability of the likeliest class (CALM, arXiv:2207.07061)."""

    def confidence(self, table):
        return table.max_prob


@dataclass(frozen=True, kw_only=True)
class Margin(AtLeast):
    """The likeliest class's probability less the next one's (CALM)."""

    def confidence(self, table):
        return table.margin


@dataclass(frozen=True, kw_only=True)
class StateSimilarity(AtLeast):
    """The cosine of an exit's state and the one before; the first exit is never taken (CALM), but for threshold=0."""

    def confidence(self, table):
        return np.maximum(_given(table, "similarity"), 0)


@dataclass(frozen=True, kw_only=True)
class Learned(AtLeast):
    """What a learned exit head says (BERxiT; CALM's meta-classifier)."""

    def confidence(self, table):
        return _given(table, "score")


@dataclass(frozen=True, kw_only=True)
class Calibrated(AtLeast):
    """The probability of the likeliest class after dividing each exit's logits by its temperature; take them from
    `fit_temperatures`."""

    temperatures: tuple[float, ...] = ()

    def confidence(self, table):
        if len(self.temperatures) != table.exits:
            raise ConfigError("temperatures", f"{len(self.temperatures)} for {table.exits} exits")
        logits = _given(table, "logits") / np.asarray(self.temperatures)[:, None]
        return np.exp(log_softmax(logits).max(-1))


@dataclass(frozen=True, kw_only=True)
class QExit:
    """Exit scores being probabilities of halting there, given that it has not: stops where their distribution has more
    than `quantile` behind it (PALBERT, arXiv:2204.03276). Nothing is drawn."""

    quantile: float = 0.5

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ConfigError("quantile", f"{self.quantile} is outside [0, 1]")

    @property
    def earliest(self) -> int:
        return 0

    def stops(self, table):
        return 1 - np.cumprod(1 - _given(table, "score"), axis=1) > self.quantile


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Stops where the entropy of the classes is below `threshold`, nats (BranchyNet, arXiv:1709.01686; DeeBERT,
    arXiv:2004.12993); `normalised`: as a part of log C (FastBERT's speed, arXiv:2004.02178). 0 never stops."""

    threshold: Threshold = 0.3
    normalised: bool = False

    @property
    def earliest(self) -> int:
        reached = [exit for exit, threshold in enumerate(np.atleast_1d(self.threshold)) if threshold > 0]
        return reached[0] if reached else NEVER

    def stops(self, table):
        scale = np.log(int(table.classes)) if self.normalised else 1.0
        return table.entropy < _of_exits(self.threshold, table) * scale


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Stops once so many exits in a row have agreed with the one before them (PABEE, arXiv:2006.04152): never before
    exit number `patience`, counted from 0."""

    patience: int = 3

    def __post_init__(self):
        _at_least_1("patience", self.patience)

    @property
    def earliest(self) -> int:
        return self.patience

    def stops(self, table):
        same = np.zeros(table.prediction.shape, bool)
        same[:, 1:] = table.prediction[:, 1:] == table.prediction[:, :-1]
        return _in_a_row(same) >= self.patience


@dataclass(frozen=True, kw_only=True)
class SimilarityPatience:
    """Stops once so many exits in a row had a distribution whose Jensen–Shannon divergence from the one before is below
    `threshold`, nats (F-PABEE, arXiv:2305.11916). 0 never stops."""

    threshold: Threshold = 0.02
    patience: int = 2

    def __post_init__(self):
        _at_least_1("patience", self.patience)

    @property
    def earliest(self) -> int:
        return self.patience

    def stops(self, table):
        return _in_a_row(table.divergence < _of_exits(self.threshold, table)) >= self.patience


RULES = Registry(
    "exit rule",
    {
        "max_prob": MaxProb,
        "margin": Margin,
        "entropy": Entropy,
        "patience": Patience,
        "similarity_patience": SimilarityPatience,
        "state_similarity": StateSimilarity,
        "learned": Learned,
        "calibrated": Calibrated,
        "q_exit": QExit,
    },
)


def fit_temperatures(table: ExitTable) -> tuple[float, ...]:
    """For each exit the temperature at which this table's targets are likeliest (Guo et al., arXiv:1706.04599), between
    e⁻⁴ and e⁴. Raises `ConfigError` for a table without logits."""
    logits = np.asarray(_given(table, "logits"), np.float64)

    def loss(log_temperature: float, exit: int) -> float:
        log_p = log_softmax(logits[:, exit] * np.exp(-log_temperature))
        return -np.take_along_axis(log_p, table.target[:, None], axis=-1).mean()

    fits = [minimize_scalar(loss, bounds=(-4, 4), args=(exit,), method="bounded") for exit in range(table.exits)]
    return tuple(float(np.exp(fit.x)) for fit in fits)


def _in_a_row(holds: Bool[np.ndarray, "N E"]) -> Int[np.ndarray, "N E"]:
    """How many exits up to this one, itself included, it has held without a break."""
    count = np.zeros(holds.shape, np.int64)
    for exit in range(holds.shape[1]):
        before = count[:, exit - 1] if exit else 0
        count[:, exit] = np.where(holds[:, exit], before + 1, 0)
    return count


def _of_exits(threshold: Threshold, table: ExitTable) -> np.ndarray:
    wide = np.asarray(threshold, np.float64)
    if wide.ndim and len(wide) != table.exits:
        raise ConfigError("threshold", f"{len(wide)} numbers for {table.exits} exits")
    return wide


def _given(table: ExitTable, name: str) -> np.ndarray:
    value = getattr(table, name)
    if value is None:
        raise ConfigError("", f"this rule needs {name}, which the exit table has not")
    return value


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(name, f"{value} is not positive")
