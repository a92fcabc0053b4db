"""Movement: tokens to the slots of their experts and back. What moves is decided elsewhere, so movements give the
same numbers.

`einsum` is the reference: one-hot masks of size S × E × C, matrix products forward and backward. `gather` moves rows
by index only; since a slot holds one pair and a pair has one slot, both its backward passes are gathers as well,
never a scatter of rows."""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.base.sharding import vary_like
from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots


class Movement(Protocol):
    """`dispatch` fills the slots (empty ones are 0); `combine` returns Σ over a token's pairs of weight · its slot's
    output.

    A token without a kept pair gets exactly 0.
    """

    def dispatch(self, x_GSD: Float[Array, "G S D"], pairs: Pairs, slots: Slots) -> Float[Array, "E G C D"]: ...

    def combine(self, out_EGCD: Float[Array, "E G C D"], pairs: Pairs, slots: Slots) -> Float[Array, "G S D"]: ...


class Einsum:
    """One-hot matrix products: S·E·C memory and 2·S·E·C·D multiply-adds a group. The reference for small shapes."""

    def dispatch(self, x_GSD, pairs, slots):
        mask_GSEC = _at_slots(jnp.ones_like(pairs.weight), pairs, slots)
        return jnp.einsum("gsd,gsec->egcd", x_GSD, mask_GSEC.astype(x_GSD.dtype))

    def combine(self, out_EGCD, pairs, slots):
        weight_GSEC = _at_slots(pairs.weight, pairs, slots)
        return jnp.einsum("egcd,gsec->gsd", out_EGCD, weight_GSEC.astype(out_EGCD.dtype))


def _at_slots(values_GP: Float[Array, "G P"], pairs: Pairs, slots: Slots) -> Float[Array, "G S E C"]:
    """Each kept pair's value at its (token, expert, slot), 0 elsewhere."""
    groups, num_experts, num_slots = slots.pair.shape
    empty_GSEC = vary_like(jnp.zeros((groups, pairs.of_token.shape[1], num_experts, num_slots)), values_GP)
    position_GP = jnp.where(slots.keep, slots.position, num_slots)  # past the end: left out
    group_G1 = jnp.arange(groups)[:, None]
    return empty_GSEC.at[group_G1, pairs.token, pairs.expert, position_GP].set(values_GP, mode="drop")


class Gather:
    """Rows by index. Costs O(tokens · K) rows moved each way, whatever E and C."""

    def dispatch(self, x_GSD, pairs, slots):
        groups, size, width = x_GSD.shape
        z_ND = dispatch_rows(x_GSD.reshape(groups * size, width), slot_index(pairs, slots))
        _, num_experts, num_slots = slots.pair.shape
        return z_ND.reshape(num_experts, groups, num_slots, width)

    def combine(self, out_EGCD, pairs, slots):
        groups, size, _ = pairs.of_token.shape
        out_ND = out_EGCD.reshape(-1, out_EGCD.shape[-1])
        weight_P = vary_like(pairs.weight.reshape(-1), out_EGCD)
        return combine_rows(out_ND, weight_P, slot_index(pairs, slots)).reshape(groups, size, -1)


MOVEMENTS: Mapping[str, Movement] = {"gather": Gather(), "einsum": Einsum()}


@struct
class Index:
    """Who is where, over the flattened groups: tokens T = G·S, pairs G·P, slots N = E·G·C in that order of axes. One
    past the end stands for nobody."""

    token_N: Int[Array, " N"]
    pair_N: Int[Array, " N"]
    slot_P: Int[Array, " GP"]
    pair_TK: Int[Array, "T K"]


def slot_index(pairs: Pairs, slots: Slots) -> Index:
    groups, size = pairs.token.shape
    _, tokens, k = pairs.of_token.shape
    _, num_experts, num_slots = slots.pair.shape
    group_G11 = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    everyone = lambda local, size: jnp.where(local == size, groups * size, group_G11 * size + local)  # noqa: E731
    pair_N = everyone(slots.pair, size).transpose(1, 0, 2).reshape(-1)
    token_P = (group_G11[..., 0] * tokens + pairs.token).reshape(-1)
    slot_GP = (pairs.expert * groups + group_G11[..., 0]) * num_slots + slots.position
    return Index(
        token_N=token_P.at[pair_N].get(mode="fill", fill_value=groups * tokens),
        pair_N=pair_N,
        slot_P=jnp.where(slots.keep, slot_GP, groups * num_experts * num_slots).reshape(-1),
        pair_TK=everyone(pairs.of_token, size).reshape(-1, k),
    )


def at(values: Array, index: Int[Array, " N"], fill: int = 0) -> Array:
    """Entries by number; a number one past the end gives `fill`."""
    return values.at[index].get(mode="fill", fill_value=fill)


def slots_by_choice(index: Index) -> list[Int[Array, " T"]]:
    """For each of the K columns of `pair_TK`, the slots of those pairs."""
    nowhere = index.pair_N.size
    return [at(index.slot_P, pair_T, fill=nowhere) for pair_T in index.pair_TK.T]


def sum_slots(rows_ND: Float[Array, "N D"], index: Index) -> Float[Array, "T D"]:
    """Each token's sum over the slots of its pairs."""
    first_TD, *others = (at(rows_ND, slot_T) for slot_T in slots_by_choice(index))
    return sum(others, first_TD)


@jax.custom_vjp
def dispatch_rows(x_TD, index: Index):
    return at(x_TD, index.token_N)


def _dispatch_bwd(index: Index, dz_ND):
    return sum_slots(dz_ND, index), None


dispatch_rows.defvjp(lambda x_TD, index: (dispatch_rows(x_TD, index), index), _dispatch_bwd)


@jax.custom_vjp
def combine_rows(out_ND, weight_P, index: Index):
    columns = zip(index.pair_TK.T, slots_by_choice(index), strict=True)
    return sum(at(weight_P, pair_T)[:, None].astype(out_ND.dtype) * at(out_ND, slot_T) for pair_T, slot_T in columns)


def _combine_fwd(out_ND, weight_P, index: Index):
    return combine_rows(out_ND, weight_P, index), (out_ND, weight_P, index)


def _combine_bwd(residuals, dy_TD):
    out_ND, weight_P, index = residuals
    dy_ND = at(dy_TD, index.token_N)  # read once for both gradients
    dout_ND = at(weight_P, index.pair_N)[:, None].astype(dy_TD.dtype) * dy_ND
    # Float32: a weight's gradient is a sum over the model width.
    dweight_N = jnp.sum((dy_ND * out_ND).astype(jnp.float32), axis=-1)
    return dout_ND, at(dweight_N, index.slot_P).astype(weight_P.dtype), None


combine_rows.defvjp(_combine_fwd, _combine_bwd)
