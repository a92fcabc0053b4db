"""What early exits risk, example by example or sequence by sequence, and the rule that a tolerated risk allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
from jaxtyping import Float

from sparsejax.base.errors import ConfigError, did_you_mean
from sparsejax.infer import risk
from sparsejax.infer.exit_metrics import Exits, at_exit
from sparsejax.infer.exit_rules import ExitRule, leave
from sparsejax.infer.exit_table import ExitTable, log_softmax

Losses = Float[np.ndarray, " N"]


def consistency_gap(table: ExitTable, exits: Exits) -> Losses:
    """1 where the prediction is not the full model's (CALM, arXiv:2207.07061): needs no targets."""
    return (at_exit(table.prediction, exits) != table.prediction[:, -1]).astype(np.float64)


def prediction_gap(table: ExitTable, exits: Exits) -> Losses:
    """1 where the full model is right and the exit is not."""
    return (table.correct[:, -1] & ~at_exit(table.correct, exits)).astype(np.float64)


def brier_gap(table: ExitTable, exits: Exits) -> Losses:
    """By how much ½ Σ_c (p_c − [c = target])² is more than the full model's, 0 where it is less: in [0, 1]."""
    if table.logits is None:
        raise ConfigError("", "brier needs logits, which the exit table has not")
    p_NEC = np.exp(log_softmax(table.logits))
    p_NEC[np.arange(len(table)), :, table.target] -= 1
    brier_NE = 0.5 * np.square(p_NEC).sum(-1)
    return np.maximum(at_exit(brier_NE, exits) - brier_NE[:, -1], 0)


GAPS = {"consistency": consistency_gap, "prediction": prediction_gap, "brier": brier_gap}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a rule is chosen: `method` and what it promises are those of `sparsejax.infer.risk`."""

    gap: str = "consistency"  # of GAPS
    method: Literal["crc", "ltt", "ucb"] = "ltt"
    tolerance: float = 0.05
    failure: float = 0.05  # unused by crc
    level: Literal["example", "group"] = "example"  # group: an example's loss is the mean of its group's

    def __post_init__(self):
        if self.gap not in GAPS:
            raise ConfigError("gap", f"{self.gap!r}; allowed: {', '.join(GAPS)}.{did_you_mean(self.gap, GAPS)}")
        if self.method not in ("crc", "ltt", "ucb"):
            raise ConfigError("method", f"{self.method!r}; allowed: crc, ltt, ucb")
        if not self.tolerance >= 0:
            raise ConfigError("tolerance", f"{self.tolerance} is negative")
        if not 0 < self.failure < 1:
            raise ConfigError("failure", f"{self.failure} is outside (0, 1)")

    def losses(self, table: ExitTable, exits: Exits) -> Losses:
        each = GAPS[self.gap](table, exits)
        return each if self.level == "example" else group_means(each, table)

    def choose(self, rules: Sequence[ExitRule], table: ExitTable, first: int = 0) -> Optional[int]:
        """The index of the fastest of `rules`, from the safest on, that keeps the promise; None: the full model.

        Examples have to be drawn independently: of tokens of a few sequences that is not so, their groups may be."""
        losses = np.stack([self.losses(table, leave(rule, table, first)) for rule in rules])
        if self.method == "crc":
            return risk.conformal_risk(losses, self.tolerance)
        method = risk.learn_then_test if self.method == "ltt" else risk.upper_bound
        return method(losses, self.tolerance, self.failure)


def group_means(each: Losses, table: ExitTable) -> Losses:
    """The mean of every group of the table, in the order of their numbers: a sequence's loss from its tokens'."""
    if table.group is None:
        raise ConfigError("level", "group needs the examples' groups, which the exit table has not")
    _, place = np.unique(table.group, return_inverse=True)
    return np.bincount(place, weights=each) / np.bincount(place)
