"""Axis 3, correction, part four: scores that sharpen as training goes on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport
from sparsejax.routers.candidates import Selector


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """Logits, with what noise they have, are divided by a temperature that falls from `start` to `end` in so many
    `steps` of the optimizer, by equal differences, and stays (DTS-Gate, arXiv:2112.14397: from dense to sparse). The
    z-loss is of the logits as they are. With score=softmax and a selection that goes by how large a score is, fewer and
    fewer experts are taken."""

    start: float = 2.0
    end: float = 0.3
    steps: int = 1000

    rows = 2  # nothing is added to the ranking; the number of steps so far
    thresholds = False

    def __post_init__(self):
        for name in ("start", "end", "steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if self.end > self.start:
            raise ConfigError("end", f"{self.end} is more than start={self.start}")

    def check(self, selection: Selector) -> None:
        pass

    def temperature(self, state: Float[Array, "N E"]) -> Float[Array, ""]:
        gone = jnp.minimum(jax.lax.stop_gradient(state[1, 0]) / self.steps, 1)
        return self.start + gone * (self.end - self.start)

    def measure(self, ranking_GSE, mask_GS, k):
        return None

    def pressure(self, state, scores_GSE, mask_GS) -> None:
        return None

    def loss(self, report: MoEReport, tokens, k: int) -> None:
        return None

    def update(self, state: Float[Array, "*R N E"], report: MoEReport, k: int, free: int = 0) -> Float[Array, "*R N E"]:
        return state.at[..., 1, :].add(1.0)
