"""Experts without a network: the router scores them like any other, but their pairs take no slot, are never dropped
and travel nowhere (MoE++, arXiv:2410.07348; the identity experts of LongCat-Flash, arXiv:2509.01322)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import normal, param
from sparsejax.nn.mlp import residual_scale
from sparsejax.ops.assignment import Pairs, sum_over_pairs
from sparsejax.routers.projections import project


@dataclass(frozen=True)
class FreeExperts:
    """Their numbers. In the router's columns they come after the experts with a network, in this order."""

    zero: int = 0  # f(x) = 0
    copy: int = 0  # f(x) = x
    constant: int = 0  # f(x) = a₁ x + a₂ v with (a₁, a₂) = softmax(x W)

    @property
    def total(self) -> int:
        return self.zero + self.copy + self.constant

    def size(self, d_model: int) -> tuple[int, int]:
        """(parameters, multiply-adds of one token's matrix products), those of the constant experts."""
        return 3 * d_model * self.constant, 3 * d_model * self.constant

    def init(self, key: PRNGKeyArray, backbone: Backbone) -> dict[str, nnx.Param]:
        """W `[D, 2 · N]` and v `[N, D]` of N constant experts."""
        if not self.constant:
            return {}
        mix_key, value_key = jax.random.split(key)
        d_model, count = backbone.d_model, self.constant
        return {
            "mix": param(normal(mix_key, (d_model, 2 * count), d_model**-0.5), ("embed", None), "expert"),
            "value": param(normal(value_key, (count, d_model), residual_scale(backbone)), (None, "embed"), "expert"),
        }


def free_output(
    x_GSD: Float[Array, "G S D"],
    pairs: Pairs,
    first: int,
    experts: FreeExperts,
    parameters: Mapping[str, Any],
) -> Float[Array, "G S D"]:
    """Σ over a token's pairs with free experts of weight · f(x); `first` is the number of the first of them."""

    def of(wanted_GP: Bool[Array, "G P"]) -> Float[Array, "G S"]:
        """Weights of these pairs by token, whether the list is one for all groups or one for each."""
        chosen_GP = jnp.where(wanted_GP & pairs.valid, pairs.weight, 0)
        return sum_over_pairs(chosen_GP, pairs).reshape(x_GSD.shape[:2])

    first_copy, first_constant = first + experts.zero, first + experts.zero + experts.copy
    own_GS = of((pairs.expert >= first_copy) & (pairs.expert < first_constant))  # what x is multiplied with
    if not experts.constant:
        return own_GS[..., None].astype(x_GSD.dtype) * x_GSD
    weight_GSN = jnp.stack([of(pairs.expert == first_constant + n) for n in range(experts.constant)], axis=-1)
    logits_GSM = project(x_GSD.astype(jnp.float32), parameters["mix"])
    a_GSN2 = weight_GSN[..., None] * jax.nn.softmax(logits_GSM.reshape(*weight_GSN.shape, 2), axis=-1)
    own_GS = own_GS + a_GSN2[..., 0].sum(-1)
    values_ND = parameters["value"].astype(x_GSD.dtype)
    constants_GSD = jnp.einsum("gsn,nd->gsd", a_GSN2[..., 1].astype(x_GSD.dtype), values_ND)
    return own_GS[..., None].astype(x_GSD.dtype) * x_GSD + constants_GSD
