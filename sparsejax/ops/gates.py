"""The estimators of a binary gate by name, for the config of whatever skips, jumps or drops."""

from dataclasses import dataclass
from typing import Protocol

import jax
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.ops import estimators
from sparsejax.ops.estimators import Key


class GateEstimator(Protocol):
    """One logit θ a gate; without a key, as in evaluation, the gate is a function of θ alone."""

    @property
    def binary(self) -> bool:
        """Whether gates are 0 or 1: what they turn off need not be computed."""
        ...

    def __call__(self, logits: Float[Array, "*N"], key: Key = None) -> Float[Array, "*N"]: ...

    def on(self, logits: Float[Array, "*N"]) -> Float[Array, "*N"]:
        """The probability that a drawn gate is not 0, with gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class StraightThrough:
    """Drawn from σ(θ), θ > 0 in evaluation; the gradient is σ'(θ) whatever was drawn."""

    binary = True

    def __call__(self, logits: Float[Array, "*N"], key: Key = None) -> Float[Array, "*N"]:
        return estimators.binary_straight_through(logits, key)

    def on(self, logits: Float[Array, "*N"]) -> Float[Array, "*N"]:
        return jax.nn.sigmoid(logits)


@dataclass(frozen=True, kw_only=True)
class Gumbel:
    """σ((θ + noise) / temperature), rounded if `hard`, with the gradient of what was rounded."""

    temperature: float = 1.0
    hard: bool = True

    def __post_init__(self):
        _positive("temperature", self.temperature)

    @property
    def binary(self) -> bool:
        return self.hard

    def __call__(self, logits: Float[Array, "*N"], key: Key = None) -> Float[Array, "*N"]:
        return estimators.gumbel_sigmoid(logits, key, temperature=self.temperature, hard=self.hard)

    def on(self, logits: Float[Array, "*N"]) -> Float[Array, "*N"]:
        return jax.nn.sigmoid(logits)


@dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """A number in [0, 1], exactly 0 or 1 with positive probability (arXiv:1712.01312)."""

    temperature: float = 2 / 3
    low: float = -0.1
    high: float = 1.1

    binary = False

    def __post_init__(self):
        _positive("temperature", self.temperature)
        if self.low >= 0:
            raise ConfigError("low", f"{self.low} is not below 0: no gate would ever be off")
        if self.high <= 1:
            raise ConfigError("high", f"{self.high} is not above 1: no gate would ever be fully on")

    def __call__(self, logits: Float[Array, "*N"], key: Key = None) -> Float[Array, "*N"]:
        shape = {"temperature": self.temperature, "low": self.low, "high": self.high}
        return estimators.hard_concrete(logits, key, **shape)

    def on(self, logits: Float[Array, "*N"]) -> Float[Array, "*N"]:
        shape = {"temperature": self.temperature, "low": self.low, "high": self.high}
        return estimators.hard_concrete_on(logits, **shape)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(name, f"{value} is not positive")


GATES = Registry("estimator", {"straight_through": StraightThrough, "gumbel": Gumbel, "hard_concrete": HardConcrete})
