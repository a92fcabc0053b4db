"""Logits from a token's own vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.nn.linear import normal, param
from sparsejax.routers.candidates import Traits

Parameters = Mapping[str, Float[Array, "..."]]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """x W (Shazeer et al., arXiv:1701.06538, who start from W = 0, so that at first the noise alone chooses)."""

    start: Literal["normal", "zeros"] = "normal"

    traits = Traits()

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        stddev = d_model**-0.5 if self.start == "normal" else 0.0
        return {"weight": router_param(key, (d_model, num_experts), stddev)}

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        return d_model * num_experts, d_model * num_experts

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        return project(x_GSD, parameters["weight"])


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """cos(P x, w_e) / τ in `width` dimensions: what is compared is direction alone (X-MoE, arXiv:2204.09179).

    |logit| ≤ 1/τ, and a longer x has the same logits. τ is learned, from `temperature`, and is never less than
    `lowest`; beyond it, it has no gradient."""

    width: int = 16
    temperature: float = 0.5
    lowest: float = 0.01

    traits = Traits()

    def __post_init__(self):
        check_width(self.width)
        if self.lowest <= 0:
            raise ConfigError("lowest", f"{self.lowest} is not positive")
        if self.temperature < self.lowest:
            raise ConfigError("temperature", f"{self.temperature} is less than lowest={self.lowest}")

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        projection_key, weight_key = jax.random.split(key)
        return {
            "projection": router_param(projection_key, (d_model, self.width), d_model**-0.5),
            "weight": router_param(weight_key, (self.width, num_experts), self.width**-0.5, None),
            "log_scale": param(jnp.full((1,), -np.log(self.temperature), jnp.float32), (None,), "router"),
        }

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        products = d_model * self.width + self.width * num_experts
        return products + 1, products

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        seen = _unit(project(x_GSD, parameters["projection"]), -1)
        scale = jnp.exp(jnp.minimum(parameters["log_scale"], -np.log(self.lowest)))
        return scale * project(seen, _unit(parameters["weight"], 0))


@dataclass(frozen=True, kw_only=True)
class ProductKey:
    """Expert (i, j) of an m × n grid scores q₁ · a_i + q₂ · b_j, q₁ and q₂ being the halves of a query of `width`
    numbers (Lample et al., arXiv:1907.05242, without their norm of the query).

    m + n sub-keys tell m · n = E experts apart; m is the largest divisor of E up to √E. The k best of such sums are
    found without forming all E by `ops.product_key.product_key_top_k`; a router forms them, for its probabilities."""

    width: int = 64

    traits = Traits()

    def __post_init__(self):
        check_width(self.width)
        if self.width % 2:
            raise ConfigError("width", f"{self.width} is odd; a query has two halves")

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        half, (rows, columns) = self.width // 2, grid(num_experts)
        keys, stddev = jax.random.split(key, 3), self.width**-0.5  # of a sum over both halves
        return {
            "query": router_param(keys[0], (d_model, self.width), d_model**-0.5),
            "rows": router_param(keys[1], (half, rows), stddev, None),
            "columns": router_param(keys[2], (half, columns), stddev, None),
        }

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        products = d_model * self.width + self.width // 2 * sum(grid(num_experts))
        return products, products

    def __call__(self, x_GSD, parameters, inputs, num_experts):
        first, second = jnp.split(project(x_GSD, parameters["query"]), 2, axis=-1)
        rows, columns = project(first, parameters["rows"]), project(second, parameters["columns"])
        return (rows[..., :, None] + columns[..., None, :]).reshape(*x_GSD.shape[:2], -1)


def grid(num_experts: int) -> tuple[int, int]:
    """(m, n) with m · n experts and m ≤ n as near each other as they can be."""
    rows = max(m for m in range(1, int(num_experts**0.5) + 1) if num_experts % m == 0)
    return rows, num_experts // rows


def project(x_GSD: Float[Array, "G S D"], weight_DE: Float[Array, "D E"]) -> Float[Array, "G S E"]:
    """x W at full precision: experts are told apart by small differences."""
    return jnp.einsum("gsd,de->gse", x_GSD, weight_DE, precision=jax.lax.Precision.HIGHEST)


def router_param(key: PRNGKeyArray, shape: tuple[int, int], stddev: float, rows: str | None = "embed") -> nnx.Param:
    """A matrix of the router, truncated normal; `rows` is the logical axis of its first dimension."""
    return param(normal(key, shape, stddev), (rows, None), "router")


def check_width(width: int) -> None:
    if width < 1:
        raise ConfigError("width", f"{width} is not positive")


def _unit(vectors: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Of length 1; vectors of zeros stay, with a gradient of 0."""
    squared = jnp.sum(jnp.square(vectors), axis, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
