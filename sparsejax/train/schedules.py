"""Learning-rate schedules: how the rate moves between the first step and the last.

A schedule is called with the peak rate and the number of steps and gives a function of the step. All of them warm up
linearly, never from exactly zero (the first update would be wasted): step `s` of `W` warm-up steps runs at
`peak · (s + 1) / (W + 1)`.
"""

import dataclasses
from typing import Optional

import optax

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry

MOST_AUTOMATIC_WARMUP = 1000  # steps; a tenth of a very long run would be warm-up for its own sake


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then the peak to the end."""

    warmup_steps: Optional[int] = None  # optimizer steps; None: a tenth of the run, at most 1000

    def __post_init__(self):
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError("warmup_steps", f"{self.warmup_steps} is negative; allowed: 0 or more, or None")

    def __call__(self, peak: float, total_steps: int) -> optax.Schedule:
        """step (int32[]) -> rate (f32[]). Raises `ConfigError` when the warm-up does not leave a step at the peak."""
        return self._after_warmup(peak, self._warmup(total_steps), optax.constant_schedule(peak))

    def _warmup(self, total_steps: int) -> int:
        if self.warmup_steps is None:
            return min(total_steps // 10, MOST_AUTOMATIC_WARMUP)
        if self.warmup_steps >= total_steps:
            message = (
                f"{self.warmup_steps} warm-up steps in a run of {total_steps} steps; allowed: 0 to {total_steps - 1}"
            )
            raise ConfigError("warmup_steps", message)
        return self.warmup_steps

    @staticmethod
    def _after_warmup(peak: float, warmup: int, rest: optax.Schedule) -> optax.Schedule:
        if warmup == 0:
            return rest
        return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), rest], [warmup])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Constant):
    """Warm-up, then half a cosine down to `final_fraction` of the peak, reached when the run ends."""

    final_fraction: float = 0.1  # of the peak

    def __post_init__(self):
        super().__post_init__()
        check_fraction("final_fraction", self.final_fraction)

    def __call__(self, peak: float, total_steps: int) -> optax.Schedule:
        warmup = self._warmup(total_steps)
        decay = optax.cosine_decay_schedule(peak, total_steps - warmup, alpha=self.final_fraction)
        return self._after_warmup(peak, warmup, decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Constant):
    """Warm-up, the peak, and over the last `decay_fraction` of the run a straight line to `final_fraction` of it."""

    decay_fraction: float = 0.2  # of all steps
    final_fraction: float = 0.0  # of the peak

    def __post_init__(self):
        super().__post_init__()
        check_fraction("decay_fraction", self.decay_fraction)
        check_fraction("final_fraction", self.final_fraction)

    def __call__(self, peak: float, total_steps: int) -> optax.Schedule:
        warmup = self._warmup(total_steps)
        decay = round(self.decay_fraction * total_steps)
        if warmup + decay > total_steps:
            raise ConfigError(
                "decay_fraction",
                f"{warmup} warm-up and {decay} decay steps ({self.decay_fraction:g} of the run) exceed its "
                f"{total_steps} steps; allowed: at most {(total_steps - warmup) / total_steps:g}",
            )
        if decay == 0:
            return self._after_warmup(peak, warmup, optax.constant_schedule(peak))
        line = optax.linear_schedule(peak, peak * self.final_fraction, decay, total_steps - warmup - decay)
        return self._after_warmup(peak, warmup, line)


def check_fraction(key: str, value: float) -> None:
    """Raises `ConfigError` when the setting `key` is not a share of a whole."""
    if not 0 <= value <= 1:
        raise ConfigError(key, f"{value:g} is not a fraction; allowed: 0 to 1")


SCHEDULES = Registry("schedule", {"cosine": Cosine, "wsd": WarmupStableDecay, "constant": Constant})
