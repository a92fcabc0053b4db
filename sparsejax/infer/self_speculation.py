"""Self-speculative decoding (LayerSkip, arXiv:2404.16710): the first layers and an exit's head draft some tokens, the
other layers read all of them at once, and what the whole model would have said is kept.

A round begins with a token that no cache holds. The first E layers read it and each drafted token after it; their
states, and their keys and values, are those that the whole model would have: the other layers go on from there. Rows
accept on their own, and stand at places of their own. Caches need no cropping: whatever lies at or behind a row's place
is written again before anything reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import Hidden
from sparsejax.blocks.halting import NoHalting
from sparsejax.blocks.tokens import EveryToken
from sparsejax.infer.sampling import Sampling, distribution
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel
from sparsejax.model.partial import embedded, features_at, logits_at, run_layers
from sparsejax.model.stack import Caches

DRAFT, ACCEPT, REPLACE = range(3)
"""What a draw decides: keys are folded with it."""


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation:
    """Drafts of `length` tokens by the first `layers` layers."""

    layers: int
    length: int = 4

    def __post_init__(self):
        for name in ("layers", "length"):
            if getattr(self, name) < 1:
                raise RequestError(f"draft {name} {getattr(self, name)}; allowed: 1 or more")

    def check(self, config: ModelConfig) -> None:
        """Raises `RequestError` unless models of this config can decode so."""
        if self.layers >= config.num_layers:
            raise RequestError(
                f"draft layers {self.layers}; allowed: 1 … {config.num_layers - 1}, fewer than the model's"
            )
        if not all(isinstance(tokens, EveryToken) for tokens in (config.sequence, config.select)):
            raise RequestError("self-speculation wants a model whose layers compute on every token")
        if not isinstance(config.halting, NoHalting):
            raise RequestError("self-speculation wants a model whose tokens go through all layers (model.halting=none)")
        for name, memory in config.memory.items():
            if memory.address.window is not None or memory.consume.window(config) is not None:
                raise RequestError(f"self-speculation cannot take back what model.memory.{name} remembers of a draft")


@struct
class Round:
    """`tokens` are kept up to number `kept` − 1, the rest is a guess that was wrong."""

    tokens: Int[Array, "B m+1"]
    kept: Int[Array, " B"]
    caches: Caches


def speculate(
    model: LanguageModel,
    how: SelfSpeculation,
    sampling: Sampling,
    vocab_size: int,
    token_B: Int[Array, " B"],
    before_B: Int[Array, " B"],
    position_B: Int[Array, " B"],
    real_B: Bool[Array, " B"],
    caches: Caches,
    keys_B: PRNGKeyArray,
    make_batch: Callable[..., Batch],
) -> Round:
    """One round of an unrolled model from token `token_B` at `position_B`: between 1 and m + 1 tokens for every row."""
    layers, m = model.config.num_layers, how.length

    def probabilities(x: Hidden, batch: Batch, depth: int) -> Float[Array, "B T V"]:
        logits_BTV = logits_at(model, features_at(model, x, batch, depth), depth)
        told = jax.vmap(lambda logits_V: distribution(logits_V[:vocab_size], sampling))
        return _by_row(told)(jax.sharding.reshard(logits_BTV, P(BATCH_AXES, None, None)))

    def draft(carry, step):
        token_B, before_B, caches = carry
        batch = make_batch(token_B[:, None], (position_B + step)[:, None], real_B[:, None], before_B[:, None])
        x, context, caches = embedded(model, batch, caches)
        x, caches = run_layers(model, x, context, caches, range(how.layers))
        q_BV = probabilities(x, batch, how.layers)[:, 0]
        next_B = _by_row(lambda key, at, q_V: _draw(key, at, DRAFT, q_V))(keys_B, position_B + step, q_BV)
        return (next_B, token_B, caches), (token_B, before_B, x, q_BV)

    (*_, caches), drafted = jax.lax.scan(draft, (token_B, before_B, caches), jnp.arange(m + 1))
    tokens_BT, previous_BT = drafted[0].T, drafted[1].T
    x = jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), drafted[2])
    places_BT = position_B[:, None] + jnp.arange(m + 1)
    batch = make_batch(tokens_BT, places_BT, jnp.broadcast_to(real_B[:, None], places_BT.shape), previous_BT)
    _, context, _ = embedded(model, batch, caches)
    x, caches = run_layers(model, x, context, caches, range(how.layers, layers))
    given = keys_B, position_B, tokens_BT, probabilities(x, batch, layers), jnp.moveaxis(drafted[3], 0, 1)
    kept_B, final_B = _by_row(accepted)(*given)
    # What follows the accepted drafts is drawn anew.
    said_BT = jnp.concatenate([tokens_BT[:, 1:], tokens_BT[:, :1]], axis=1)
    said_BT = jnp.where(jnp.arange(m + 1) == kept_B[:, None], final_B[:, None], said_BT)
    return Round(tokens=said_BT, kept=kept_B + 1, caches=caches)


def accepted(
    key: PRNGKeyArray,
    position: Int[Array, ""],
    tokens_T: Int[Array, " m+1"],
    p_TV: Float[Array, "m+1 V"],
    q_TV: Float[Array, "m+1 V"],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(drafts that are accepted, the token after them): each draft x with probability min(1, p(x)/q(x)), and the first
    that is not is replaced by a draw of (p − q)₊; after the last one, a draw of p (Leviathan et al., arXiv:2211.17192).
    """
    m = len(tokens_T) - 1
    number_M = jnp.arange(m)
    draft_M = tokens_T[1:]
    p_M, q_M = p_TV[number_M, draft_M], q_TV[number_M, draft_M]
    lots_M = jax.vmap(lambda at: jax.random.uniform(_key(key, at, ACCEPT)))(position + number_M)
    number = jnp.cumprod(lots_M * q_M < p_M).sum()
    rest_V = jnp.where(number < m, jnp.maximum(p_TV[number] - q_TV[number], 0), p_TV[number])
    # Where p and q differ by rounding alone nothing may be left of p − q.
    rest_V = jnp.where(rest_V.sum() > 0, rest_V, p_TV[number])
    return number, _draw(key, position + number, REPLACE, rest_V)


def _by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of each row by itself, where the mesh has it."""
    return jax.shard_map(jax.vmap(function), in_specs=P(BATCH_AXES), out_specs=P(BATCH_AXES), check_vma=False)


def _draw(key: PRNGKeyArray, position: Int[Array, ""], what: int, p_V: Float[Array, " V"]) -> Int[Array, ""]:
    """A token by its weight; the heaviest where one has all of it."""
    return jax.random.categorical(_key(key, position, what), jnp.log(p_V)).astype(jnp.int32)


def _key(key: PRNGKeyArray, position: Int[Array, ""], what: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(key, position), what)
