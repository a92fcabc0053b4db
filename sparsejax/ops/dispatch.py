"""Movement: tokens to the slots of their experts and back. What moves is decided elsewhere, so movements give the
same numbers.

`einsum` is the reference: one-hot masks of size S × E × C, matrix products forward and backward. `gather` moves rows
by index only; since a slot holds one pair and a pair has one slot, both its backward passes are gathers as well,
never a scatter of rows."""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.assignment import Pairs, Slots, gather_pairs


class Movement(Protocol):
    """`dispatch` fills the slots (empty ones are 0); `combine` returns Σ over a token's pairs of weight · its slot's
    output.

    A token without a kept pair gets exactly 0.
    """

    def dispatch(self, x_GSD: Float[Array, "G S D"], pairs: Pairs, slots: Slots) -> Float[Array, "E G C D"]: ...

    def combine(
        self, out_EGCD: Float[Array, "E G C D"], weights_GSK: Float[Array, "G S K"], pairs: Pairs, slots: Slots
    ) -> Float[Array, "G S D"]: ...


class Einsum:
    """One-hot matrix products: S·E·C memory and 2·S·E·C·D multiply-adds a group. The reference for small shapes."""

    def dispatch(self, x_GSD, pairs, slots):
        mask_GSEC = _slot_masks(pairs, slots).astype(x_GSD.dtype).sum(2)
        return jnp.einsum("gsd,gsec->egcd", x_GSD, mask_GSEC)

    def combine(self, out_EGCD, weights_GSK, pairs, slots):
        weight_GSEC = jnp.einsum("gsk,gskec->gsec", weights_GSK, _slot_masks(pairs, slots).astype(weights_GSK.dtype))
        return jnp.einsum("egcd,gsec->gsd", out_EGCD, weight_GSEC.astype(out_EGCD.dtype))


def _slot_masks(pairs: Pairs, slots: Slots) -> Bool[Array, "G S K E C"]:
    """Whether the k-th pair of a token sits in slot (e, c)."""
    _, num_experts, num_slots = slots.pair.shape
    expert_GSK = gather_pairs(pairs.expert, pairs.of_token)
    position_GSK = gather_pairs(slots.position, pairs.of_token)
    keep_GSK = gather_pairs(slots.keep, pairs.of_token)
    in_expert = expert_GSK[..., None] == jnp.arange(num_experts)
    in_slot = position_GSK[..., None] == jnp.arange(num_slots)
    return (keep_GSK[..., None] & in_expert)[..., :, None] & in_slot[..., None, :]


class Gather:
    """Rows by index. Costs O(tokens · K) rows moved each way, whatever E and C."""

    def dispatch(self, x_GSD, pairs, slots):
        groups, size, width = x_GSD.shape
        x_TD = x_GSD.reshape(groups * size, width)
        z_ND = _dispatch_rows(x_TD, token_of_slot(pairs, slots), slot_of_token(pairs, slots))
        _, num_experts, num_slots = slots.pair.shape
        return z_ND.reshape(num_experts, groups, num_slots, width)

    def combine(self, out_EGCD, weights_GSK, pairs, slots):
        groups, size, k = weights_GSK.shape
        weights_TK = _vary_like(weights_GSK.reshape(groups * size, k), out_EGCD)
        out_ND = out_EGCD.reshape(-1, out_EGCD.shape[-1])
        token_N, slot_TK = token_of_slot(pairs, slots), slot_of_token(pairs, slots)
        choice_N = choice_of_slot(pairs, slots)
        return _combine_rows(out_ND, weights_TK, token_N, choice_N, slot_TK).reshape(groups, size, -1)


MOVEMENTS: Mapping[str, Movement] = {"gather": Gather(), "einsum": Einsum()}


def token_of_slot(pairs: Pairs, slots: Slots) -> Int[Array, " N"]:
    """For each slot, in the order E, G, C: its token's number in the flattened groups; G·S where the slot is empty."""
    groups, size = pairs.of_token.shape[:2]
    token_GEC = _per_slot(pairs.token, slots, fill=size)
    first_G = size * jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    token_GEC = jnp.where(token_GEC == size, groups * size, token_GEC + first_G)
    return token_GEC.transpose(1, 0, 2).reshape(-1)


def choice_of_slot(pairs: Pairs, slots: Slots) -> Int[Array, " N"]:
    """For each slot, in the order E, G, C: which of its token's K pairs it holds; 0 where it is empty."""
    groups, _, k = pairs.of_token.shape
    choice_GSK = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), pairs.of_token.shape)
    choice_GP = (
        jnp.zeros_like(pairs.token)
        .at[jnp.arange(groups)[:, None, None], pairs.of_token]
        .set(choice_GSK, unique_indices=True)
    )
    return _per_slot(choice_GP, slots, fill=0).transpose(1, 0, 2).reshape(-1)


def slot_of_token(pairs: Pairs, slots: Slots) -> Int[Array, "T K"]:
    """For each token of the flattened groups and each of its K pairs: the slot's number in the order E, G, C; E·G·C
    if dropped."""
    groups, num_experts, num_slots = slots.pair.shape
    group_G1 = jnp.arange(groups, dtype=jnp.int32)[:, None]
    slot_GP = (pairs.expert * groups + group_G1) * num_slots + slots.position
    slot_GP = jnp.where(slots.keep, slot_GP, groups * num_experts * num_slots)
    return gather_pairs(slot_GP, pairs.of_token).reshape(-1, pairs.of_token.shape[-1])


def _per_slot(values_GP: Int[Array, "G P"], slots: Slots, fill: int) -> Int[Array, "G E C"]:
    groups, num_experts, num_slots = slots.pair.shape
    padded = jnp.pad(values_GP, ((0, 0), (0, 1)), constant_values=fill)
    return jnp.take_along_axis(padded, slots.pair.reshape(groups, -1), axis=-1).reshape(groups, num_experts, num_slots)


def _rows(x_TD: Float[Array, "T D"], index: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    """Rows by number; a number one past the end gives zeros."""
    return x_TD.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _dispatch_rows(x_TD, token_N, slot_TK):
    return _rows(x_TD, token_N)


def _dispatch_fwd(x_TD, token_N, slot_TK):
    return _rows(x_TD, token_N), slot_TK


def _dispatch_bwd(slot_TK, dz_ND):
    return sum(_rows(dz_ND, slot_TK[:, k]) for k in range(slot_TK.shape[1])), None, None


_dispatch_rows.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine_rows(out_ND, weights_TK, token_N, choice_N, slot_TK):
    terms = (
        weights_TK[:, k, None].astype(out_ND.dtype) * _rows(out_ND, slot_TK[:, k]) for k in range(slot_TK.shape[1])
    )
    return sum(terms)


def _combine_fwd(out_ND, weights_TK, token_N, choice_N, slot_TK):
    return _combine_rows(out_ND, weights_TK, token_N, choice_N, slot_TK), (
        out_ND,
        weights_TK,
        token_N,
        choice_N,
        slot_TK,
    )


def _combine_bwd(residuals, dy_TD):
    out_ND, weights_TK, token_N, choice_N, slot_TK = residuals
    weight_N = weights_TK.at[token_N, choice_N].get(mode="fill", fill_value=0)
    dout_ND = weight_N[:, None].astype(dy_TD.dtype) * _rows(dy_TD, token_N)
    # Float32: a weight's gradient is a sum over the model width.
    columns = [
        jnp.einsum("td,td->t", dy_TD, _rows(out_ND, slot_TK[:, k]), preferred_element_type=jnp.float32)
        for k in range(slot_TK.shape[1])
    ]
    return dout_ND, jnp.stack(columns, axis=-1).astype(weights_TK.dtype), None, None, None


_combine_rows.defvjp(_combine_fwd, _combine_bwd)


def _vary_like(value: Array, like: Array) -> Array:
    """Inside `shard_map`: `value`, typed as varying over every mesh axis `like` varies over, so that its cotangent
    may."""
    missing = tuple(jax.typeof(like).manual_axis_type.varying - jax.typeof(value).manual_axis_type.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value
