"""Dropless exchange: every pair's row to the device that holds its expert, and back. Called inside `shard_map`.

Devices along the axis hold equal runs of experts, so rows sorted by expert are sorted by device. A receiver has room
for a fixed number of rows. Loads are exchanged first; then every device knows which rows fit: of every source and
expert the first ones, up to a number common to all that one receiver serves.

`ragged_all_to_all` moves these rows and no others. `all_to_all` moves the same rows in fixed slots, room for all of a
source's in each, where the platform has nothing better (XLA for CPU). Both leave the same rows at the same places;
places beyond a device's rows mean nothing."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots
from sparsejax.ops.dispatch import Index, at, near, sorted_index

Transport = Literal["all_to_all", "ragged_all_to_all"]


@struct
class Leg:
    """One way of the exchange, as one of the X devices sees it. Rows for or from a device are contiguous."""

    out_first_X: Int[Array, " X"]  # where the rows for each device begin here
    out_size_X: Int[Array, " X"]
    there_first_X: Int[Array, " X"]  # where they begin at the receiver
    in_first_X: Int[Array, " X"]  # where the rows of each device begin once here, ascending
    in_size_X: Int[Array, " X"]


@struct
class Exchange:
    """Who sends what, Q being the receivers' room."""

    index: Index  # of this device's rows that go, sorted by expert, in the place of slots
    lost_P: Bool[Array, " P"]  # pairs that do not fit the receiver's buffer
    outward: Leg
    homeward: Leg
    expert_Q: Int[Array, " Q"]  # of this device's experts, the one of each row it receives
    received: Int[Array, ""]  # rows
    wanted: Int[Array, ""]  # rows that would have come, had there been room


def plan_exchange(pairs: Pairs, slots: Slots, num_experts: int, room: int, axis: str) -> Exchange:
    """From the pairs of one group and `fill_slots` without a limit. Sorts and moves integers alone."""
    devices = jax.lax.axis_size(axis)
    each = num_experts // devices
    wanted_XE = jax.lax.all_gather(slots.start[0, 1:] - slots.start[0, :-1], axis)
    by_receiver = wanted_XE.reshape(devices, devices, each).transpose(1, 0, 2).reshape(devices, -1)
    level_E = jnp.repeat(jax.vmap(functools.partial(common_level, room=room))(by_receiver), each)
    kept_XE = jnp.minimum(wanted_XE, level_E)
    me = jax.lax.axis_index(axis)

    index = sorted_index(pairs, slots, kept_XE[me], pairs.token.shape[1])

    sent_XX = kept_XE.reshape(devices, devices, each).sum(-1, dtype=jnp.int32)  # by source and receiver
    before = lambda values, along: jnp.cumsum(values, axis=along, dtype=jnp.int32) - values  # noqa: E731
    at_source_XX, at_receiver_XX = before(sent_XX, 1), before(sent_XX, 0)
    mine_Xe = jax.lax.dynamic_slice_in_dim(kept_XE, me * each, each, axis=1)
    ends = jnp.cumsum(mine_Xe.reshape(-1), dtype=jnp.int32)
    row_Q = jnp.arange(room, dtype=jnp.int32)
    return Exchange(
        index=index,
        lost_P=slots.keep[0] & (index.slot_P == index.pair_N.size),
        outward=Leg(
            out_first_X=at_source_XX[me],
            out_size_X=sent_XX[me],
            there_first_X=at_receiver_XX[me],
            in_first_X=at_receiver_XX[:, me],
            in_size_X=sent_XX[:, me],
        ),
        homeward=Leg(
            out_first_X=at_receiver_XX[:, me],
            out_size_X=sent_XX[:, me],
            there_first_X=at_source_XX[:, me],
            in_first_X=at_source_XX[me],
            in_size_X=sent_XX[me],
        ),
        expert_Q=jnp.searchsorted(ends, row_Q, side="right").astype(jnp.int32) % each,
        received=ends[-1],
        wanted=by_receiver[me].sum(dtype=jnp.int32),
    )


def common_level(counts_M: Int[Array, " M"], room: int) -> Int[Array, ""]:
    """The largest L with Σ min(count, L) ≤ room; the largest count when all fit.

    For any j, the sum is at most that of the j smallest counts + (M − j) · L, with equality for the right j: L is the
    largest of what these bounds allow."""
    ascending_M = jnp.sort(counts_M)
    below_M = jnp.cumsum(ascending_M, dtype=jnp.int32) - ascending_M
    others_M = jnp.arange(counts_M.size, 0, -1, dtype=jnp.int32)
    level = jnp.maximum(((room - below_M) // others_M).max(), 0)
    return jnp.where(counts_M.sum() <= room, ascending_M[-1], level)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange_rows(
    transport: Transport, axis: str, room: int, rows_ND: Float[Array, "N D"], leg: Leg, back: Leg
) -> Float[Array, "Q D"]:
    """The rows that a leg brings here. Its transpose is the way back."""
    if transport == "ragged_all_to_all":
        nothing_QD = jnp.zeros_like(rows_ND, shape=(room, rows_ND.shape[1]))
        offsets = leg.out_first_X, leg.out_size_X, leg.there_first_X, leg.in_size_X
        return jax.lax.ragged_all_to_all(rows_ND, nothing_QD, *offsets, axis_name=axis)
    slots = min(len(rows_ND), room)
    slot_M = jnp.arange(slots, dtype=jnp.int32)
    out_XMD = near(rows_ND, leg.out_first_X[:, None] + slot_M)
    in_XMD = jax.lax.all_to_all(out_XMD, axis, split_axis=0, concat_axis=0, tiled=True)
    row_Q = jnp.arange(room, dtype=jnp.int32)
    source_Q = jnp.searchsorted(leg.in_first_X + leg.in_size_X, row_Q, side="right").astype(jnp.int32)
    place_Q = source_Q * slots + row_Q - at(leg.in_first_X, source_Q)
    return near(in_XMD.reshape(-1, rows_ND.shape[1]), place_Q)


def _exchange_fwd(transport: Transport, axis: str, room: int, rows_ND, leg: Leg, back: Leg):
    return exchange_rows(transport, axis, room, rows_ND, leg, back), (leg, back, len(rows_ND))


def _exchange_bwd(transport: Transport, axis: str, room: int, residuals, dout_QD):
    leg, back, rows = residuals
    return exchange_rows(transport, axis, rows, dout_QD, back, leg), None, None


exchange_rows.defvjp(_exchange_fwd, _exchange_bwd)
