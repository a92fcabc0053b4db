"""Axis 3, correction, part one: which experts a token may be ranked for at all."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry


class Limit(Protocol):
    def __call__(self, ranking_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]: ...

    def check(self, num_experts: int, k: int) -> None:
        """Raises `ConfigError` when there are not k experts left to choose from."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoLimit:
    """Every expert."""

    def __call__(self, ranking_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        return ranking_GSE

    def check(self, num_experts: int, k: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """The experts lie in `groups` (nodes); a token may only go to its best `kept` of them, a group's rank being the sum
    of its `best` highest rankings (DeepSeek-V2: best = 1; V3, arXiv:2412.19437: best = 2).

    Others are set to −∞ and not to 0, which would win against negative rankings."""

    groups: int = 4
    kept: int = 2
    best: int = 2

    def __post_init__(self):
        for name in ("groups", "kept", "best"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if self.kept > self.groups:
            raise ConfigError("kept", f"{self.kept} is more than groups={self.groups}")

    def check(self, num_experts: int, k: int) -> None:
        if num_experts % self.groups:
            raise ConfigError("groups", f"{self.groups} groups do not divide num_experts={num_experts}")
        each = num_experts // self.groups
        if self.best > each:
            raise ConfigError("best", f"{self.best} is more than the {each} experts of a group")
        if k > self.kept * each:
            raise ConfigError("kept", f"{self.kept} groups of {each} experts are fewer than the {k} experts of a token")

    def __call__(self, ranking_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        by_group = ranking_GSE.reshape(*ranking_GSE.shape[:2], self.groups, -1)
        rank_of_group = jax.lax.top_k(by_group, self.best)[0].sum(-1)
        _, kept = jax.lax.top_k(rank_of_group, self.kept)
        allowed = (kept[..., None] == jnp.arange(self.groups)).any(-2)
        return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(ranking_GSE.shape)


LIMITS = Registry("limit", {"none": NoLimit, "groups": GroupLimit})
