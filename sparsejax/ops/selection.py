"""Some tokens of each row, by their scores: a static number of them, in the order of the row.

Functions of one device's rows. Scores are float32; index T stands for no token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.base.structs import struct


@struct
class Recursing:
    """A row on its way through recursions of one block."""

    x: Float[Array, "B T D"]
    alive: Bool[Array, "B T"]  # tokens that the recursion before computed on; in the first, all


def best_tokens(scores_BT: Float[Array, "B T"], valid_BT: Bool[Array, "B T"], k: int) -> Int[Array, "B K"]:
    """The k best of each row's valid tokens, sorted by place; T where there are fewer. Of equal scores the first wins.

    Sorted, causal attention among them needs no other mask than that among all."""
    length = scores_BT.shape[1]
    scores_BK, token_BK = jax.lax.top_k(jnp.where(valid_BT, scores_BT.astype(jnp.float32), -jnp.inf), k)
    return jnp.sort(jnp.where(jnp.isfinite(scores_BK), token_BK, length), axis=1)


def among_best(scores_BT: Float[Array, "B T"], valid_BT: Bool[Array, "B T"], k: Int[Array, ""]) -> Bool[Array, "B T"]:
    """Which tokens are those of `best_tokens`, for a k that is known only when it runs."""
    order_BT = jnp.argsort(jnp.where(valid_BT, -scores_BT.astype(jnp.float32), jnp.inf), axis=1, stable=True)
    return (jnp.argsort(order_BT, axis=1) < k) & valid_BT


def members(token_BK: Int[Array, "B K"], length: int) -> Bool[Array, "B T"]:
    """Which tokens are among these."""
    of_row = lambda token_K: jnp.zeros(length, bool).at[token_K].set(True, mode="drop")  # noqa: E731
    return jax.vmap(of_row)(token_BK)


def put(
    x_BTx: Shaped[Array, "B T *x"], new_BKx: Shaped[Array, "B K *x"], token_BK: Int[Array, "B K"]
) -> Shaped[Array, "B T *x"]:
    """`x` with these tokens replaced."""
    of_row = lambda x, new, token: x.at[token].set(new, mode="drop", indices_are_sorted=True)  # noqa: E731
    return jax.vmap(of_row)(x_BTx, new_BKx.astype(x_BTx.dtype), token_BK)


def last_until(token_BK: Int[Array, "B K"], among_BS: Int[Array, "B S"]) -> Int[Array, "B K"]:
    """Of each token the last place in another list of tokens, sorted like this one, that holds none after it; −1: there
    is none."""
    of_row = lambda token_K, among_S: jnp.searchsorted(among_S, token_K, side="right") - 1  # noqa: E731
    return jax.vmap(of_row)(token_BK, among_BS).astype(jnp.int32)
