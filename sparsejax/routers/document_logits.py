"""Logits that the tokens of a document share: which experts it is for is decided once, or from what was read so far."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.routers.candidates import Inputs, Traits
from sparsejax.routers.projections import project, router_param


@dataclass(frozen=True, kw_only=True)
class DomainLogits:
    """v W, v being a learned vector of the document's domain (TaskMoE, arXiv:2110.03742): all tokens of a domain have
    the same experts, and a domain's experts can be had without the others. There are `domains` vectors; a domain's is
    the one of its number modulo that."""

    domains: int = 8

    traits = Traits(needs=frozenset({"domains"}), blind=True)

    def __post_init__(self):
        if self.domains < 1:
            raise ConfigError("domains", f"{self.domains} is not positive")

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        vector_key, weight_key = jax.random.split(key)
        return {
            "domains": router_param(vector_key, (self.domains, d_model), 1.0, None),
            "weight": router_param(weight_key, (d_model, num_experts), d_model**-0.5),
        }

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """The products are those of the table, one row a domain, and so none of a token."""
        return d_model * (self.domains + num_experts), 0

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        table = project(parameters["domains"][None], parameters["weight"])
        return table[0][inputs.domains % self.domains]


@dataclass(frozen=True, kw_only=True)
class SequenceLogits:
    """x̄ W, x̄ standing for the document: the vector of its `first` token, the mean of those up to here
    (`prefix_mean`), or the `mean` of all of them, which tells a token what comes after it.

    Not for generation: a token that goes on from a cache has its own vector and no other."""

    pool: Literal["first", "prefix_mean", "mean"] = "prefix_mean"

    @property
    def traits(self) -> Traits:
        return Traits(causal=self.pool != "mean", whole=True)

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        return {"weight": router_param(key, (d_model, num_experts), d_model**-0.5)}

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        return d_model * num_experts, d_model * num_experts

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        x_TD = x_GSD.reshape(-1, x_GSD.shape[-1])
        pooled_TD = _pool(x_TD, document_starts(inputs).reshape(-1), self.pool)
        return project(pooled_TD.reshape(x_GSD.shape), parameters["weight"])


def document_starts(inputs: Inputs) -> Bool[Array, "G S"]:
    """Where another document begins. Every token of padding is one of its own, so that it is pooled with nothing."""
    return (inputs.positions == 0) | ~inputs.mask


def _pool(x_TD: Float[Array, "T D"], starts_T: Bool[Array, " T"], pool: str) -> Float[Array, "T D"]:
    """What stands for its document at each of T tokens in a row, the documents being one behind the other."""
    size = starts_T.shape[0]
    if pool == "mean":
        document_T = jnp.cumsum(starts_T) - 1
        sums_TD = jax.ops.segment_sum(x_TD, document_T, num_segments=size)
        counts_T = jax.ops.segment_sum(jnp.ones_like(x_TD[:, 0]), document_T, num_segments=size)
        return (sums_TD / jnp.maximum(counts_T, 1)[:, None])[document_T]
    first_T = jax.lax.cummax(jnp.where(starts_T, jnp.arange(size), 0))
    if pool == "first":
        return x_TD[first_T]

    def join(left, right):
        """A running sum that begins anew: none is the difference of two large ones."""
        (left_begun, left_sum), (right_begun, right_sum) = left, right
        return left_begun | right_begun, right_sum + jnp.where(right_begun[:, None], 0, left_sum)

    _, sums_TD = jax.lax.associative_scan(join, (starts_T, x_TD))
    return sums_TD / (jnp.arange(size) - first_T + 1)[:, None]
