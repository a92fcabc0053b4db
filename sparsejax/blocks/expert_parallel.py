"""Rows through their experts, wherever those live on the mesh. Called inside `shard_map`."""

import dataclasses
import functools
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from sparsejax.base.sharding import vary_like
from sparsejax.ops.assignment import Pairs, fill_slots, one_group
from sparsejax.ops.dispatch import combine_rows, dispatch_rows, weight_rows
from sparsejax.ops.dropout import Dropout
from sparsejax.ops.exchange import Exchange, Transport, exchange_rows
from sparsejax.ops.ffn import Activation, Specs, Weights, expert_ffn
from sparsejax.ops.grouped import Implementation, common_slots, grouped_experts


def expert_parallel(
    z_EGCD: Float[Array, "E G C D"],
    weights: Weights,
    weight_specs: Specs,
    activation: Activation,
    scale_EGC: Optional[Float[Array, "E G C"]] = None,
    seed_EGC: Optional[UInt32[Array, "E G C"]] = None,
    drop_rate: float = 0.0,
) -> Float[Array, "E G C D"]:
    """Slots to the devices that hold their experts, through them, and back, each output scaled by `scale_EGC`. Weights
    split for storage are gathered here, so that their gradients leave by reduce-scatter. Where `weight_specs` split the
    hidden width over `tensor`, what comes back is one summand of several. With seeds `drop_rate` of each slot's hidden
    layer is dropped."""
    exchange = "expert" in weight_specs[0]
    if exchange:
        with jax.named_scope("exchange"):
            there = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=1, tiled=True)
            z_EGCD, scale_EGC, seed_EGC = jax.tree.map(there, (z_EGCD, scale_EGC, seed_EGC))
    experts, groups, num_slots, width = z_EGCD.shape
    with jax.named_scope("experts"):
        rows = experts, groups * num_slots
        scale_EN = None if scale_EGC is None else scale_EGC.reshape(rows)
        dropout = None
        if seed_EGC is not None:
            dropout = Dropout(rate=drop_rate, seed_N=seed_EGC.reshape(rows), unit_F=_units(weights, weight_specs))
        out_END = expert_ffn(z_EGCD.reshape(*rows, width), weights, activation, scale_EN, dropout, weight_specs)
    out_EGCD = out_END.reshape(experts, groups, num_slots, width)
    if exchange:
        with jax.named_scope("exchange"):
            out_EGCD = jax.lax.all_to_all(out_EGCD, "expert", split_axis=1, concat_axis=0, tiled=True)
    return out_EGCD


def _units(weights: Weights, specs: Specs) -> Int[Array, " F"]:
    """The numbers of the hidden units that this device has."""
    width = weights[0].shape[-1]
    first = jax.lax.axis_index("tensor") * width if "tensor" in specs[0] else 0
    return first + jnp.arange(width, dtype=jnp.int32)


def gathered_experts(
    x_TD: Float[Array, "T D"],
    pairs: Pairs,
    weights: Weights,
    weight_specs: Specs,
    even: int,
    activation: Activation,
    implementation: Implementation,
) -> tuple[Float[Array, "T D"], Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """`exchanged_experts` when tokens are few: every device is given those of all and computes what they ask of its own
    experts, and the sums go back. A token travels once, not once for each of its experts, and no loads are told before.
    The last result is the number of pairs computed here."""
    here = len(weights[0])
    with jax.named_scope("exchange"):
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        all_XD, everyone = gather(x_TD), one_group(jax.tree.map(gather, pairs))
    expert_P = everyone.expert - here * jax.lax.axis_index("expert")
    mine_P = (expert_P >= 0) & (expert_P < here)
    asked = dataclasses.replace(everyone, expert=jnp.where(mine_P, expert_P, 0), valid=everyone.valid & mine_P)
    with jax.named_scope("experts"):
        slots = fill_slots(asked, here, common_slots(even, here), None)
        y_XD, computed, in_blocks = grouped_experts(
            all_XD, weights, weight_specs, asked, slots, activation, implementation
        )
    with jax.named_scope("exchange"):
        y_TD = jax.lax.psum_scatter(y_XD, "expert", scatter_dimension=0, tiled=True)
    return y_TD, computed, in_blocks, slots.assigned.sum(dtype=jnp.int32)


def exchanged_experts(
    x_TD: Float[Array, "T D"],
    pairs: Pairs,
    exchange: Exchange,
    weights: Weights,
    weight_specs: Specs,
    even: int,
    activation: Activation,
    implementation: Implementation,
    transport: Transport,
) -> tuple[Float[Array, "T D"], Int[Array, ""], Int[Array, ""]]:
    """`grouped_experts` for pairs whose experts are on any device of the axis `expert`: what is received is routed once
    more, each row to one expert. `even` is a device's share of rows when all have the same load."""
    room, rows = exchange.expert_Q.size, exchange.index.pair_N.size
    legs = exchange.outward, exchange.homeward
    with jax.named_scope("exchange"):
        z_ND = dispatch_rows(x_TD, exchange.index)
        scale_N1 = weight_rows(vary_like(pairs.weight[0], x_TD), exchange.index)[:, None]
        z_QD, scale_Q1 = (exchange_rows(transport, "expert", room, part, *legs) for part in (z_ND, scale_N1))
    row_Q = jnp.arange(room, dtype=jnp.int32)
    received = Pairs(
        token=row_Q[None],
        expert=exchange.expert_Q[None],
        weight=jnp.asarray(scale_Q1).T,
        valid=row_Q[None] < exchange.received,
        of_token=row_Q[None, :, None],
    )
    here = len(weights[0])
    with jax.named_scope("experts"):
        slots = fill_slots(received, here, common_slots(even, here), None)
        y_QD, computed, in_blocks = grouped_experts(
            jnp.asarray(z_QD), weights, weight_specs, received, slots, activation, implementation
        )
    with jax.named_scope("exchange"):
        out_ND = exchange_rows(transport, "expert", rows, y_QD, *reversed(legs))
        return jnp.asarray(combine_rows(out_ND, exchange.index)), computed, in_blocks
