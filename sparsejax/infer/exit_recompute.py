"""What tokens that left early owe to the layers above: their keys and values, computed when a later token comes there.

The residual that a token had at each exit which it reached is kept. Before a token goes on beyond an exit, all tokens
of its row that have stopped there run the layers up to the next one, `CHUNK` at a time; so it sees the keys and values
of the full model, and its answer depends on exits only by the layers that it has not run itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import Context, Hidden
from sparsejax.blocks.tokens import NOWHERE
from sparsejax.model.lm import LanguageModel
from sparsejax.model.partial import run_layers
from sparsejax.model.stack import Caches

CHUNK = 8
"""Tokens of a row that run the layers above together: about as many as cost no more than one where weights are read
from memory."""

ROWS: Any = P(BATCH_AXES)


@struct
class Owing:
    """Caches, with what they lack. S places of a row; E exits, the last of which is the whole model."""

    caches: Caches
    states: tuple[Hidden, ...]  # the residual at each exit but the last, `[B, S, D]`, of tokens that have come there
    tokens: Int[Array, "B S"]
    previous: Int[Array, "B S"]
    done: Int[Array, "B E"]  # how many tokens of the row, the first ones, have run the layers up to each exit


def owing(model: LanguageModel, caches: Caches, length_B: Int[Array, " B"]) -> Owing:
    """That so many tokens of each row owe nothing."""
    keys = caches["prefix_0"].attention
    assert keys is not None  # every block has attention
    shape, exits = keys.segments.shape, len(model.config.exits.depths)
    numbers = jnp.zeros(shape, jnp.int32, out_sharding=ROWS)
    like = jax.eval_shape(
        lambda: model.spread(model.embedding(numbers), _batch(numbers, numbers, numbers, numbers > 0))
    )
    zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=ROWS), like)  # noqa: E731
    done_BE = jnp.broadcast_to(length_B[:, None], (shape[0], exits + 1), out_sharding=P(BATCH_AXES, None))
    states = tuple(zeros() for _ in range(exits))
    return Owing(caches=caches, states=states, tokens=numbers, previous=numbers, done=done_BE)


def noted(owed: Owing, number: int, x: Hidden, batch: Batch, active_B: Bool[Array, " B"]) -> Owing:
    """After active rows ran their next token, `batch`, up to exit `number`, where its residual is `x`."""
    place_B1 = jnp.where(active_B[:, None], batch.positions, NOWHERE)
    done_BE = jnp.where(active_B[:, None] & _is(owed, number), batch.positions + 1, owed.done)
    tokens_BS, previous_BS = owed.tokens, owed.previous
    if number == 0:
        tokens_BS = put(tokens_BS, place_B1, batch.tokens)
        previous_BS = put(previous_BS, place_B1, batch.preceding())
    states = _with_state(owed, number, x, place_B1)
    return Owing(caches=owed.caches, states=states, tokens=tokens_BS, previous=previous_BS, done=done_BE)


def caught_up(
    model: LanguageModel, owed: Owing, number: int, active_B: Bool[Array, " B"], place_B: Int[Array, " B"]
) -> Owing:
    """After the tokens of active rows before their places ran the layers from exit `number` − 1 to `number`, where they
    had not."""
    depths = (*model.config.exits.depths, model.config.num_layers)
    layers = range(depths[number - 1], depths[number])
    lacking = lambda owed: active_B & (owed.done[:, number] < place_B)  # noqa: E731

    def chunk(owed: Owing) -> Owing:
        places_BW = owed.done[:, number, None] + jnp.arange(CHUNK)
        owed_BW = lacking(owed)[:, None] & (places_BW < place_B[:, None])
        x, tokens_BW, previous_BW = at((owed.states[number - 1], owed.tokens, owed.previous), places_BW)
        batch = _batch(tokens_BW, previous_BW, places_BW, owed_BW)
        x, caches = run_layers(model, x, Context(batch=batch, mode="generate"), owed.caches, layers)
        states = _with_state(owed, number, x, jnp.where(owed_BW, places_BW, NOWHERE))
        done_BE = owed.done + jnp.where(_is(owed, number), owed_BW.sum(-1, dtype=jnp.int32)[:, None], 0)
        return Owing(caches=caches, states=states, tokens=owed.tokens, previous=owed.previous, done=done_BE)

    return jax.lax.while_loop(lambda owed: lacking(owed).any(), chunk, owed)


def _batch(tokens_BT: Array, previous_BT: Array, places_BT: Array, real_BT: Array) -> Batch:
    nothing = jnp.zeros_like(tokens_BT)
    return Batch(
        tokens=tokens_BT,
        targets=nothing,
        segments=real_BT.astype(jnp.int32),
        positions=jnp.where(real_BT, places_BT, 0),
        loss_mask=nothing > 0,
        domains=nothing,
        rows=nothing[:, 0],
        previous=previous_BT,
        places=jnp.where(real_BT, places_BT, NOWHERE),
    )


def _is(owed: Owing, number: int) -> Bool[Array, " E"]:
    return jnp.arange(owed.done.shape[1]) == number


def _with_state(owed: Owing, number: int, x: Hidden, places_BW: Int[Array, "B W"]) -> tuple[Hidden, ...]:
    """The states with those of exit `number`, if they are kept."""
    if number == len(owed.states):
        return owed.states
    new = put(owed.states[number], places_BW, x)
    return (*owed.states[:number], new, *owed.states[number + 1 :])


def at(stores: Any, places_BW: Int[Array, "B W"]) -> Any:
    """What stands at places of arrays `[B, S, …]`; at those beyond the end, what is last."""
    local = lambda stores, places: jax.tree.map(functools.partial(_local_at, places), stores)  # noqa: E731
    return jax.shard_map(local, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)(stores, places_BW)


def put(stores: Any, places_BW: Int[Array, "B W"], new: Any) -> Any:
    """The arrays with other values there; those beyond the end are dropped."""

    def local(stores: Any, places: Array, new: Any) -> Any:
        row_B1 = jnp.arange(len(places))[:, None]
        return jax.tree.map(lambda a, b: a.at[row_B1, places].set(b.astype(a.dtype), mode="drop"), stores, new)

    return jax.shard_map(local, in_specs=(ROWS, ROWS, ROWS), out_specs=ROWS, check_vma=False)(stores, places_BW, new)


def _local_at(places_BW: Array, array: Array) -> Array:
    return array.at[jnp.arange(len(places_BW))[:, None], places_BW].get(mode="clip")
