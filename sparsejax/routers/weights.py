"""Axis 5, combine weight: scores of the selected experts → what their outputs are multiplied with.

Called once capacity is known. A dropped pair gets no weight, because no slot returns anything for it; `keep_GSK`
matters only to those that share its part out among the survivors."""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.base.registry import Registry


class Weight(Protocol):
    @property
    def constant_for_one(self) -> bool:
        """Whether a single selected expert always gets the same weight, so that k = 1 leaves the router without a
        gradient."""
        ...

    def __call__(self, scores_GSK: Float[Array, "G S K"], keep_GSK: Bool[Array, "G S K"]) -> Float[Array, "G S K"]: ...


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The score itself (Switch, V-MoE)."""

    scale: float = 1.0

    @property
    def constant_for_one(self) -> bool:
        return False

    def __call__(self, scores_GSK: Float[Array, "G S K"], keep_GSK: Bool[Array, "G S K"]) -> Float[Array, "G S K"]:
        return self.scale * scores_GSK


@dataclass(frozen=True, kw_only=True)
class Renormalized:
    """Scores over their sum: over all selected, `before` any is dropped (GShard, Mixtral), or over the survivors,
    `after`."""

    drop: Literal["before", "after"] = "before"
    scale: float = 1.0

    @property
    def constant_for_one(self) -> bool:
        return True

    def __call__(self, scores_GSK: Float[Array, "G S K"], keep_GSK: Bool[Array, "G S K"]) -> Float[Array, "G S K"]:
        counted_GSK = scores_GSK if self.drop == "before" else jnp.where(keep_GSK, scores_GSK, 0)
        return self.scale * scores_GSK / jnp.maximum(counted_GSK.sum(-1, keepdims=True), 1e-9)


WEIGHTS = Registry("weight", {"raw": Raw, "renormalized": Renormalized})
