"""Tokens that leave a row for good: attention among those that stay, the order they leave in, and the rows that are
left. Functions of one device's rows, but for `pairs` and `in_a_room`; scores and weights are float32.

`keep` is a weight for every token: as a key its attention is multiplied by it and all are normalised again, which adds
log keep to the logits. At 1 nothing changes; at 0 the token is gone, as if it had been taken out; above 1 it stands for
several."""

import math
from collections.abc import Callable
from typing import Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import struct
from sparsejax.ops.attention import soft_capped


@struct
class Survivors:
    """A row on its way: its tokens' states, and which of them are left. In compact execution T shrinks."""

    x: Float[Array, "B T D"]
    keep: Float[Array, "B T"]  # 1: is there, 0: is gone; between them in soft training; above, as it took in others
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    sizes: Int[Array, "B T"]  # tokens of the document at the start
    decided: Optional[Float[Array, "B T"]] = None  # in soft training, `keep` as evaluation would decide on these states


def attention_among(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segments_BT: Int[Array, "B T"],
    keep_BT: Float[Array, "B T"],
    soft_cap: Optional[float] = None,
    learned: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T H"]]:
    """(attention in both directions within a document, what each key receives, its own part of that, Σ of the heads'
    keys).

    What key i receives is Σ over heads of the mean over the queries of its document, weighted by their keep, of
    A[·, i]; its own part Σ over heads of A[i, i]. Only if it is `learned` a keep of 0 has a gradient."""
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTMH.shape[2]
    q_BTMgH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btmgh,bsmh->bmgts", q_BTMgH, k_BTMH, preferred_element_type=jnp.float32) / width**0.5
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT > 0)[:, None, :]
    weight_BTS = jnp.where(same_BTS, keep_BT[:, None, :], 0.0)[:, None, None]
    a = _attention_weights(soft_capped(logits, soft_cap), weight_BTS, learned)
    out = jnp.einsum("bmgts,bsmh->btmgh", a.astype(v_BTMH.dtype), v_BTMH).reshape(q_BTNH.shape)
    queries_BT = jnp.einsum("bts,bt->bs", same_BTS.astype(jnp.float32), keep_BT)
    received_BT = jnp.einsum("bmgts,bt->bs", a, keep_BT) / jnp.maximum(queries_BT, 1e-9)
    return out, received_BT, jnp.einsum("bmgtt->bt", a), k_BTMH.sum(2, dtype=jnp.float32)


def _attention_weights(logits: Float[Array, "B M G T S"], weight: Float[Array, "B 1 1 T S"], learned: bool) -> Array:
    """weight · exp(logits), normalised over keys."""
    seen = weight > 0
    if not learned:
        return jax.nn.softmax(jnp.where(seen, logits + jnp.log(jnp.where(seen, weight, 1)), -1e30), axis=-1)
    best = jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-1e30)
    below = logits - jax.lax.stop_gradient(best)
    # A key that is gone counts, in the gradient of its keep alone, for no more than the best that stays: it is finite.
    unnormalised = jnp.exp(jnp.where(seen, below, jnp.minimum(below, 0))) * weight
    total = unnormalised.sum(-1, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


def over_document(values_BT: Shaped[Array, "B T"], segments_BT: Int[Array, "B T"], most: int) -> Shaped[Array, "B T"]:
    """For every token the sum of the values of its document, there being at most so many."""
    of_row = lambda values, segments: jnp.zeros(most + 1, values.dtype).at[segments].add(values)[segments]  # noqa: E731
    return jax.vmap(of_row)(values_BT, segments_BT)


ROOMS = (0.25, 0.5, 1.0)
"""Shares of a row that there are programs for, where how many tokens run is known only then."""


def pairs(
    running_BT: Bool[Array, "B T"],
    seen_BT: Bool[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    causal: bool,
) -> Float[Array, ""]:
    """Σ over running tokens of the tokens that each sees, of any devices' rows."""

    def local(running_BT: Array, seen_BT: Array, segments_BT: Array, positions_BT: Array) -> tuple[Array]:
        length = segments_BT.shape[1]
        one_BT = seen_BT.astype(jnp.int32)
        if not causal:
            return (running_BT * over_document(one_BT, segments_BT, length),)
        upto_BT = jnp.cumsum(one_BT, axis=1)
        start_BT = jnp.maximum(jnp.arange(length) - positions_BT, 0)
        before_BT = jnp.take_along_axis(upto_BT - one_BT, start_BT, axis=1)
        return (running_BT * (upto_BT - before_BT),)

    by_row = P(BATCH_AXES)
    run = on_each_device(local, (by_row,) * 4, (by_row,))
    return run(running_BT, seen_BT, segments_BT, positions_BT)[0].sum(dtype=jnp.float32)


def rank(
    priority_BT: Float[Array, "B T"], alive_BT: Bool[Array, "B T"], segments_BT: Optional[Int[Array, "B T"]] = None
) -> Int[Array, "B T"]:
    """How many living tokens go before each: those with a higher priority, and of equal ones the earlier. Of its own
    document, or, without `segments`, of its row. Tokens that are gone come after the living.

    Sorted, not compared in pairs: XLA may work a priority out twice and round it differently, and a token would go
    before itself."""
    by_BT = jnp.argsort(jnp.where(alive_BT, -priority_BT, jnp.inf), axis=1, stable=True)
    if segments_BT is None:
        return jnp.argsort(by_BT, axis=1).astype(jnp.int32)
    of_document_BT = jnp.argsort(jnp.take_along_axis(segments_BT, by_BT, axis=1), axis=1, stable=True)
    place_BT = jnp.argsort(jnp.take_along_axis(by_BT, of_document_BT, axis=1), axis=1)
    start_BT = (segments_BT[:, None, :] < segments_BT[:, :, None]).sum(-1)
    return (place_BT - start_BT).astype(jnp.int32)


def survivors(alive_BT: Bool[Array, "B T"], size: int) -> Int[Array, "B S"]:
    """The places of the living, at most `size`, in the order of the row; T where there are fewer."""
    length = alive_BT.shape[1]
    place_BT = jnp.where(alive_BT, jnp.arange(length), length)
    return jnp.sort(place_BT, axis=1)[:, :size]


def in_a_room(
    needed_BT: Bool[Array, "B T"], of_room: Callable[[int], Callable[[Array], Array]], x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """`of_room(room)(x_BTD)` for the smallest of `ROOMS` that has room for what every row needs, `x_BTD` if none
    needs any."""
    rooms = sorted({math.ceil(share * needed_BT.shape[1]) for share in ROOMS})
    number = jnp.searchsorted(jnp.asarray([0, *rooms[:-1]]), needed_BT.sum(axis=1).max())
    return jax.lax.switch(number, [lambda x_BTD: x_BTD, *map(of_room, rooms)], x_BTD)
