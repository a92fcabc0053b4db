"""Axis 1, logits: a token's vector → one float32 number per expert. What a router learns, it learns here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.registry import Registry
from sparsejax.nn.linear import normal, param
from sparsejax.routers.candidates import Inputs

Parameters = Mapping[str, Float[Array, "..."]]


class Logits(Protocol):
    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        """Its parameters by name."""
        ...

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        ...

    def __call__(
        self, x_GSD: Float[Array, "G S D"], parameters: Parameters, inputs: Inputs
    ) -> Float[Array, "G S E"]: ...


@dataclass(frozen=True, kw_only=True)
class Linear:
    """x W (Shazeer et al., arXiv:1701.06538)."""

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        return {"weight": param(normal(key, (d_model, num_experts), d_model**-0.5), ("embed", None), "router")}

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        return d_model * num_experts, d_model * num_experts

    def __call__(self, x_GSD, parameters, inputs):
        return project(x_GSD, parameters["weight"])


def project(x_GSD: Float[Array, "G S D"], weight_DE: Float[Array, "D E"]) -> Float[Array, "G S E"]:
    """x W at full precision: experts are told apart by small differences."""
    return jnp.einsum("gsd,de->gse", x_GSD, weight_DE, precision=jax.lax.Precision.HIGHEST)


LOGITS = Registry("logits", {"linear": Linear})
