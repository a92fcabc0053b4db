"""Steps of training in which no token leaves its device (gating dropout, Liu et al., arXiv:2205.14336): the routed
experts are skipped (Gate-Expert-Drop), or those of the token's own device are all there are (Gate-Drop)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.reports import ExchangeReport
from sparsejax.base.sharding import vary_like
from sparsejax.blocks.context import Context
from sparsejax.ops.assignment import fill_slots
from sparsejax.ops.ffn import Activation, Specs, Weights
from sparsejax.ops.grouped import Implementation, common_slots, grouped_experts
from sparsejax.routers.router import Decision


def now_and_then(compute: Callable[[], Any], instead: Callable[[], Any], dropout: float, context: Context) -> Any:
    """`compute()`, or with probability `dropout` `instead()`, and only that. One coin a step for all layers,
    microbatches and devices; none is tossed outside training."""
    key = context.key if context.step_key is None else context.step_key
    if key is None or dropout == 0:
        return compute()
    return jax.lax.cond(jax.random.bernoulli(key, dropout), instead, compute)


def unrouted(compute: Callable[[], Any]) -> Any:
    """Zeros of the shape of `compute()`, without computing or communicating anything."""
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec),
        jax.eval_shape(compute),
    )
    y_BTD, moe, by_token = zeros
    decisions = by_token["decisions"]
    if decisions is not None:
        by_token = by_token | {"decisions": dataclasses.replace(decisions, experts=decisions.experts - 1)}  # none
    return y_BTD, moe, by_token


def own_experts(weights: Weights, weight_specs: Specs, num_experts: int, free: int) -> Bool[Array, " E"]:
    """Which experts this device has, the `free` ones without a network among them. Called inside `shard_map`."""
    number_E = jnp.arange(num_experts + free)
    first, here = _place(weights, weight_specs)
    return (number_E >= first) & (number_E < first + here) | (number_E >= num_experts)


def on_own_experts(
    x_GSD: Float[Array, "G S D"],
    decision: Decision,
    weights: Weights,
    weight_specs: Specs,
    num_experts: int,
    activation: Activation,
    implementation: Implementation,
) -> tuple[Float[Array, "T D"], Int[Array, ""], Int[Array, ""]]:
    """`grouped_experts` for a decision of experts that this device has."""
    x_TD, pairs = x_GSD.reshape(-1, x_GSD.shape[-1]), decision.pairs
    first, here = _place(weights, weight_specs)
    with jax.named_scope("experts"):
        mine_P = pairs.valid & (pairs.expert < num_experts)
        asked = dataclasses.replace(pairs, expert=jnp.where(mine_P, pairs.expert - first, 0), valid=mine_P)
        slots = fill_slots(asked, here, common_slots(pairs.token.size, here), None)
        return grouped_experts(x_TD, weights, weight_specs, asked, slots, activation, implementation)


def as_exchanged(decision: Decision, scored_experts: int) -> ExchangeReport:
    """Of pairs that stay, for the report of a layer whose pairs travel in other steps."""
    count = decision.slots.assigned.sum(dtype=jnp.int32)
    return ExchangeReport(
        dropped=vary_like(jnp.zeros(scored_experts, jnp.int32), count),
        received=jnp.zeros_like(count),
        room=jnp.zeros_like(count),
        demand=vary_like(jnp.zeros(65, jnp.int32), count),
    )


def _place(weights: Weights, weight_specs: Specs) -> tuple[Any, int]:
    """(number of the first expert of this device, how many it has)."""
    here = len(weights[0])
    split = "expert" in weight_specs[0]
    return (here * jax.lax.axis_index("expert") if split else 0), here
