"""Axis 5, combine weight: the pairs' scores → what the outputs of their experts are multiplied with.

Called once capacity is known. A dropped pair needs no weight of 0, because no slot returns anything for it; `keep_GP`
matters only to those that share its part out among the survivors."""

from dataclasses import dataclass
from typing import Literal, Optional, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.ops.assignment import Pairs, at_pairs, sum_over_pairs
from sparsejax.ops.estimators import straight_through


class Weight(Protocol):
    @property
    def constant_for_one(self) -> bool:
        """Whether a single selected expert always gets the same weight, so that k = 1 leaves the router without a
        gradient."""
        ...

    def __call__(self, pairs: Pairs, keep_GP: Bool[Array, "G P"], k: int) -> Float[Array, "G P"]:
        """Of every pair; `k` are the experts per token that the selection speaks of, however long the list is."""
        ...


def _check_scale(scale: float) -> None:
    if scale <= 0:
        raise ConfigError("scale", f"{scale} is not positive")


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The score itself (Switch, V-MoE)."""

    scale: float = 1.0

    def __post_init__(self):
        _check_scale(self.scale)

    @property
    def constant_for_one(self) -> bool:
        return False

    def __call__(self, pairs: Pairs, keep_GP: Bool[Array, "G P"], k: int) -> Float[Array, "G P"]:
        return self.scale * pairs.weight


LEAST = 1e-18
"""A sum of scores; its square, which gradients are divided by, is a float32 still."""


@dataclass(frozen=True, kw_only=True)
class Renormalized:
    """Scores over their sum: over all selected, `before` any is dropped (GShard, Mixtral), or over the survivors,
    `after`."""

    drop: Literal["before", "after"] = "before"
    scale: float = 1.0

    def __post_init__(self):
        _check_scale(self.scale)

    @property
    def constant_for_one(self) -> bool:
        return True

    def __call__(self, pairs: Pairs, keep_GP: Bool[Array, "G P"], k: int) -> Float[Array, "G P"]:
        counted_GP = pairs.weight if self.drop == "before" else jnp.where(keep_GP, pairs.weight, 0)
        total_GS = jnp.maximum(sum_over_pairs(counted_GP, pairs), LEAST)
        return self.scale * pairs.weight / at_pairs(total_GS, pairs)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same for every pair: 1/k unless `value` is given (Hash Layers, arXiv:2106.04426). The router gets no gradient
    from the task, so the selection must be one that needs none."""

    value: Optional[float] = None

    @property
    def constant_for_one(self) -> bool:
        return True

    def __call__(self, pairs: Pairs, keep_GP: Bool[Array, "G P"], k: int) -> Float[Array, "G P"]:
        value = 1 / k if self.value is None else self.value
        return jnp.full_like(pairs.weight, value)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """1 for every pair, with the gradient of the score (straight-through). All experts of a network that was cut into
    experts add up to it (MoEfication, arXiv:2110.01786), and the router learns all the same."""

    @property
    def constant_for_one(self) -> bool:
        return False

    def __call__(self, pairs: Pairs, keep_GP: Bool[Array, "G P"], k: int) -> Float[Array, "G P"]:
        return straight_through(jnp.ones_like(pairs.weight), pairs.weight)


WEIGHTS = Registry("weight", {"raw": Raw, "renormalized": Renormalized, "constant": Constant, "unit": Unit})
