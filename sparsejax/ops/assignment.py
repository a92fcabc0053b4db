"""The router's decision in its canonical form, and the slots it is given.

A decision is a flat list of (token, expert, weight, valid) pairs *in the order in which slots are filled*. A pair's
slot is its stable position among the pairs of its expert; a position at or beyond the capacity means that the pair is
dropped. Everything downstream (any dispatch, the ledger, the balance losses) reads this list and nothing else."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.structs import struct


@struct
class Pairs:
    """(token, expert, weight, valid) pairs of each group, in the order in which slots are filled. No (token, expert)
    occurs twice among the valid. Integers are int32, weights float32.

    `of_token` is the list's index: for every token of the group all pairs it appears in, at most K; P stands for
    none. It lets rows and weights move by gathers both ways."""

    token: Int[Array, "G P"]
    expert: Int[Array, "G P"]
    weight: Float[Array, "G P"]  # as a selector writes it, the pair's score; in a decision, the combine weight
    valid: Bool[Array, "G P"]  # False where the token is padding: such a pair takes no slot and is counted nowhere
    of_token: Int[Array, "G S K"]


@struct
class Slots:
    """Where each pair sits. Slots of an expert fill from 0 without holes."""

    position: Int[Array, "G P"]  # among the valid pairs of its expert
    keep: Bool[Array, "G P"]  # valid, of an expert with slots, and within the capacity
    pair: Int[Array, "G E C"]  # the pair in each slot, P where the slot is empty
    order: Int[Array, "G P"]  # pairs by expert, then by their place in the list; those that want no slot last
    start: Int[Array, "G E+1"]  # where each expert's begin in that order, and where the last one's end
    assigned: Int[Array, " E"]  # valid pairs by expert with slots, summed over groups
    processed: Int[Array, " E"]  # pairs in a slot, counted from the slots


def choice_major_pairs(
    experts_GSK: Int[Array, "G S K"],
    scores_GSK: Float[Array, "G S K"],
    mask_GS: Bool[Array, "G S"],
    chosen_GSK: Optional[Bool[Array, "G S K"]] = None,
) -> Pairs:
    """Every token's first choice in token order, then every second choice, … Valid are those of unmasked tokens, and
    of them those that are `chosen` (None: all)."""
    groups, size, k = experts_GSK.shape
    valid_GSK = jnp.broadcast_to(mask_GS[..., None], (groups, size, k))
    choice_major = lambda values_GSK: values_GSK.transpose(0, 2, 1).reshape(groups, k * size)  # noqa: E731
    token_P = jnp.tile(jnp.arange(size, dtype=jnp.int32), k)
    of_token_SK = jnp.arange(size, dtype=jnp.int32)[:, None] + size * jnp.arange(k, dtype=jnp.int32)[None, :]
    return Pairs(
        token=jnp.broadcast_to(token_P, (groups, k * size)),
        expert=choice_major(experts_GSK.astype(jnp.int32)),
        weight=choice_major(scores_GSK),
        valid=choice_major(valid_GSK if chosen_GSK is None else valid_GSK & chosen_GSK),
        of_token=jnp.broadcast_to(of_token_SK, (groups, size, k)),
    )


def one_group(pairs: Pairs) -> Pairs:
    """The lists of all groups as one list, G = 1."""
    groups, size = pairs.token.shape
    _, tokens, k = pairs.of_token.shape
    group_G1 = jnp.arange(groups, dtype=jnp.int32)[:, None]
    flat = lambda values_GP: values_GP.reshape(1, groups * size)  # noqa: E731
    of_token = jnp.where(pairs.of_token == size, groups * size, size * group_G1[..., None] + pairs.of_token)
    return Pairs(
        token=flat(tokens * group_G1 + pairs.token),
        expert=flat(pairs.expert),
        weight=flat(pairs.weight),
        valid=flat(pairs.valid),
        of_token=of_token.reshape(1, groups * tokens, k),
    )


def fill_slots(pairs: Pairs, num_experts: int, num_slots: int, limit_G: Optional[Int[Array, " G"]]) -> Slots:
    """Gives every valid pair the next free slot of its expert; beyond `limit_G` (≤ `num_slots` = C) pairs are dropped.
    Without a limit none is, and positions go on past the slots. Experts from number `num_experts` on have no slots.

    One stable sort by expert; no scatter of rows and no array of size S × E × C. Keys are `expert · P + index`, all
    different, so that a single-operand sort is stable by construction. Needs (E + 1) · P < 2³¹."""
    groups, size = pairs.expert.shape
    if (num_experts + 1) * size >= 2**31:
        raise ValueError(
            f"{num_experts} experts × {size} pairs of a group overflow the 32-bit sort key: use a smaller group_size"
        )
    wants_GP = pairs.valid & (pairs.expert < num_experts)
    expert_GP = jnp.where(wants_GP, pairs.expert, num_experts)
    key_GP = jnp.sort(expert_GP * size + jnp.arange(size, dtype=jnp.int32), axis=-1)
    order_GP = key_GP % size  # pairs by expert, then by their place in the list
    firsts_E = jnp.arange(num_experts + 1, dtype=jnp.int32) * size
    start_GE = jax.vmap(lambda keys: jnp.searchsorted(keys, firsts_E).astype(jnp.int32))(key_GP)
    count_GE = start_GE[:, 1:] - start_GE[:, :-1]

    slot_C = jnp.arange(num_slots, dtype=jnp.int32)
    taken_GE = count_GE if limit_G is None else jnp.minimum(count_GE, limit_G[:, None])
    filled_GEC = slot_C < taken_GE[:, :, None]
    rank_GEC = jnp.minimum(start_GE[:, :-1, None] + slot_C, size - 1)
    pair_GEC = jnp.take_along_axis(order_GP, rank_GEC.reshape(groups, -1), axis=-1).reshape(rank_GEC.shape)

    rank_GP = _inverse_permutation(order_GP)
    start_of_pair_GP = jnp.take_along_axis(start_GE, expert_GP, axis=-1)
    position_GP = rank_GP - start_of_pair_GP
    return Slots(
        position=position_GP,
        keep=wants_GP if limit_G is None else wants_GP & (position_GP < limit_G[:, None]),
        pair=jnp.where(filled_GEC, pair_GEC, size),
        order=order_GP,
        start=start_GE,
        assigned=count_GE.sum(0),
        processed=count_GE.sum(0) if limit_G is None else filled_GEC.sum((0, 2), dtype=jnp.int32),
    )


def _inverse_permutation(order_GP: Int[Array, "G P"]) -> Int[Array, "G P"]:
    """Where each pair of the list stands in the sorted order."""
    size = order_GP.shape[-1]
    ranks = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), order_GP.shape)
    return jax.vmap(lambda order, rank: jnp.zeros_like(order).at[order].set(rank, unique_indices=True))(order_GP, ranks)


def choices(pairs: Pairs) -> Int[Array, "G P"]:
    """Each pair's place among those of its token: 0 for the first choice."""
    groups, _, k = pairs.of_token.shape
    columns_GSK = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), pairs.of_token.shape)
    group_G11 = jnp.arange(groups)[:, None, None]
    return jnp.zeros_like(pairs.token).at[group_G11, pairs.of_token].set(columns_GSK, mode="drop")


def sort_pairs(pairs: Pairs, *keys_GP: Array) -> Pairs:
    """The list sorted by the last key, ties by the one before it, and ties of all in the old order."""
    order_GP = jnp.lexsort(tuple(jax.lax.stop_gradient(key) for key in keys_GP), axis=-1).astype(jnp.int32)
    size = order_GP.shape[-1]
    rank_GP = _inverse_permutation(order_GP)
    moved = lambda values_GP: jnp.take_along_axis(values_GP, order_GP, axis=-1)  # noqa: E731
    of_token = jnp.where(pairs.of_token == size, size, by_token(rank_GP, pairs))
    return Pairs(
        token=moved(pairs.token),
        expert=moved(pairs.expert),
        weight=moved(pairs.weight),
        valid=moved(pairs.valid),
        of_token=of_token,
    )


def served_tokens(pairs: Pairs, processed_GP: Bool[Array, "G P"]) -> Bool[Array, "G S"]:
    """Which tokens have at least one pair that is processed."""
    return by_token(processed_GP, pairs).any(-1)


def by_token(values_GP: Array, pairs: Pairs) -> Array:
    """A per-pair array laid out by token, `[G, S, K]`; 0 where a token has fewer than K pairs."""
    groups, size, k = pairs.of_token.shape
    index_GI = pairs.of_token.reshape(groups, size * k)
    return jnp.take_along_axis(values_GP, index_GI, axis=-1, mode="fill", fill_value=0).reshape(groups, size, k)


@jax.custom_vjp
def sum_over_pairs(values_GP: Float[Array, "G P"], pairs: Pairs) -> Float[Array, "G S"]:
    """Each token's sum over its pairs. The transpose of `at_pairs`; both are gathers, forward and backward."""
    return by_token(values_GP, pairs).sum(-1)


@jax.custom_vjp
def at_pairs(values_GS: Float[Array, "G S"], pairs: Pairs) -> Float[Array, "G P"]:
    """Each pair's token's value."""
    return jnp.take_along_axis(values_GS, pairs.token, axis=-1)


sum_over_pairs.defvjp(
    lambda values_GP, pairs: (sum_over_pairs(values_GP, pairs), pairs),
    lambda pairs, ct_GS: (at_pairs(ct_GS, pairs), None),
)
at_pairs.defvjp(
    lambda values_GS, pairs: (at_pairs(values_GS, pairs), pairs),
    lambda pairs, ct_GP: (sum_over_pairs(ct_GP, pairs), None),
)
