"""Axis 2, selection: scores → the pairs of each group, in the order in which slots are filled."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.ops.assignment import Pairs, choice_major_pairs


class Selector(Protocol):
    """Writes the list of pairs, each with its score. `experts_per_token` is the k of capacity, balance loss and active
    parameters."""

    @property
    def experts_per_token(self) -> int: ...

    def __call__(self, scores_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Pairs: ...


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Each token takes its k best experts; slots go choice-major. Ties go to the lower expert, so a router of zeros
    sends every token to experts 0 … k − 1. Switch Transformers (arXiv:2101.03961) is k = 1, GShard (arXiv:2006.16668)
    k = 2."""

    k: int = 2

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError("k", f"{self.k} is not positive")

    @property
    def experts_per_token(self) -> int:
        return self.k

    def __call__(self, scores_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Pairs:
        _, experts_GSK = jax.lax.top_k(jax.lax.stop_gradient(scores_GSE), self.k)
        return choice_major_pairs(experts_GSK, jnp.take_along_axis(scores_GSE, experts_GSK, axis=-1), mask_GS)


SELECTORS = Registry("selection", {"top_k": TopK})
