"""Bipartite soft matching of tokens (ToMe, arXiv:2210.09461): some of every second living token of a document join the
most similar of the others. Functions of one device's rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.skim import rank


def destinations(
    metric_BTH: Float[Array, "B T H"],
    alive_BT: Bool[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    merged_BT: Int[Array, "B T"],
) -> Int[Array, "B T"]:
    """Which token each one joins: of the second, fourth, … living token of a document, the most similar of the first,
    third, …, by the cosine of the metric; −1 for those that stay. The first token neither joins nor is joined.

    Args:
      merged_BT: how many of the token's document are to join another, the most similar pairs; fewer if there are not
        so many."""
    unit_BTH = metric_BTH / jnp.maximum(jnp.linalg.norm(metric_BTH, axis=-1, keepdims=True), 1e-9)
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & alive_BT[:, :, None] & alive_BT[:, None, :]
    order = jnp.arange(alive_BT.shape[1])
    number_BT = (same_BTS & (order[None, :] < order[:, None])).sum(-1)  # of the living of its document before it
    joins_BT = alive_BT & (number_BT % 2 == 1)
    takes_BT = alive_BT & (number_BT % 2 == 0) & (number_BT > 0)
    similarity = jnp.einsum("bth,bsh->bts", unit_BTH, unit_BTH)
    similarity = jnp.where(same_BTS & joins_BT[:, :, None] & takes_BT[:, None, :], similarity, -jnp.inf)
    best_BT, joins_BT = jnp.max(similarity, axis=-1), joins_BT & (similarity.max(-1) > -jnp.inf)
    chosen_BT = joins_BT & (rank(best_BT, joins_BT, segments_BT) < merged_BT)
    return jnp.where(chosen_BT, jnp.argmax(similarity, axis=-1), -1)


def merged(
    x_BTD: Float[Array, "B T D"], size_BT: Float[Array, "B T"], into_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
    """(states, sizes) after tokens have joined others: the mean weighted by size, and the sum; who joined has size 0
    and its old state."""
    joins_BTS = jax.nn.one_hot(into_BT, size_BT.shape[1], dtype=jnp.float32)  # all 0 for −1
    wide_BTD = x_BTD.astype(jnp.float32)
    new_BT = jnp.where(into_BT < 0, size_BT + jnp.einsum("bts,bt->bs", joins_BTS, size_BT), 0)
    total_BTD = size_BT[..., None] * wide_BTD + jnp.einsum("bts,btd->bsd", joins_BTS, size_BT[..., None] * wide_BTD)
    grown_BT1 = (new_BT > size_BT)[..., None]
    mean_BTD = total_BTD / jnp.where(grown_BT1, new_BT[..., None], 1)
    return jnp.where(grown_BT1, mean_BTD, wide_BTD).astype(x_BTD.dtype), new_BT
