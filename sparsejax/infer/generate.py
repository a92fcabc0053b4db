"""Continuations of prompts: one pass over the prompts fills the caches, then a compiled loop adds token after token."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct
from sparsejax.infer.early_exit import EarlyExit, exit_step
from sparsejax.infer.prompts import Prompts, check_prompts, place_prompts, token_batch
from sparsejax.infer.sampling import Sampling, sample
from sparsejax.infer.self_speculation import SelfSpeculation, speculate
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.model.stack import Caches
from sparsejax.model.unrolled import unrolled, unrolled_caches, unrolled_variables
from sparsejax.train.state import abstract_model

Model = tuple[nnx.State, nnx.State]
"""Parameters and other variables."""


class Variables(Protocol):
    """What a model computes with: a `TrainState`, or the part of one that `restore_variables` reads."""

    @property
    def params(self) -> nnx.State: ...

    @property
    def model_state(self) -> nnx.State: ...


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampled token ids, int32 `[max_tokens]` for each prompt, and how long it took, without compilation."""

    tokens: list[np.ndarray]
    prefill_seconds: float  # reading the prompts
    decode_seconds: float  # everything after
    depths: Optional[np.ndarray] = None  # layers run for each token of each prompt, with early exits
    kept: Optional[np.ndarray] = (
        None  # rounds of self-speculation that gave a prompt 1, 2, … m + 1 tokens, `[rows, m+1]`
    )
    compiled_flops: Optional[float] = None  # XLA's own count of the decoding program, which has a loop's body once

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens of all prompts per second of decoding."""
        return sum(len(row) for row in self.tokens) / max(self.decode_seconds, 1e-9)


@struct
class Decoded:
    """The caches are returned so that their memory is used again."""

    tokens: Int[Array, "B T"]
    caches: Caches
    depths: Optional[Int[Array, "B T"]] = None
    kept: Optional[Int[Array, "B m+1"]] = None


Decoding = EarlyExit | SelfSpeculation


class Generator:
    """Continues prompts with models of one config. No token is dropped for want of capacity.

    To be used inside `jax.set_mesh`. What it runs is compiled once for each shape: rows, padded length, `max_tokens`.
    Ids from `vocab_size` on are never sampled: a model may have more embeddings than its tokenizer has tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        sampling: Sampling,
        vocab_size: Optional[int] = None,
        decoding: Optional[Decoding] = None,
    ):
        """`decoding`: None runs every layer for every token. Raises `RequestError` when the model cannot decode so."""
        if decoding is not None:
            decoding.check(config)
        self.config, self.sampling, self.decoding = config, sampling, decoding
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self._graph, self._layers = (abstract_model(each)[0] for each in (config, unrolled(config)))
        self._unroll = jax.jit(lambda model: tuple(unrolled_variables(config, variables) for variables in model))
        self._compiled: dict[tuple[int, ...], tuple[Callable[..., Any], Compiled]] = {}

    def __call__(
        self,
        variables: Variables,
        prompts: Sequence[np.ndarray],
        max_tokens: int,
        seed: int = 0,
        threshold: Optional[float] = None,
    ) -> Generation:
        """`max_tokens` more tokens for each prompt, beyond the length that the model was trained on if need be.
        `threshold` stands in for that of early exits, and nothing is compiled anew for it.

        A row's samples depend on the seed, its prompt and how many equal prompts stand before it, not on other rows.

        Raises:
          RequestError: there is no prompt, one has no tokens or ids the model lacks, or a number is out of range.
        """
        check_prompts(prompts, self.config.vocab_size)
        if max_tokens < 1:
            raise RequestError(f"max_tokens={max_tokens}; allowed: 1 or more")
        if not 0 <= seed < 2**32:  # JAX would drop the higher bits
            raise RequestError(f"seed={seed}; allowed: 0 … {2**32 - 1}")
        model = (variables.params, variables.model_state)
        batch, key = place_prompts(prompts, jax.sharding.get_mesh()), jax.random.key(seed)
        shape = (*batch.tokens.shape, max_tokens)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(model, batch, key, max_tokens)
        prefill, decode = self._compiled[shape]
        # One program at a time, waited for: on CPU, two with collectives in flight can deadlock.
        begun = time.perf_counter()
        caches = jax.block_until_ready(prefill(model, batch))
        layers = jax.block_until_ready(self._unroll(model))
        limit = self._threshold(threshold)
        filled = time.perf_counter()
        decoded: Decoded = jax.block_until_ready(decode(layers, batch, caches, key, limit))
        done = time.perf_counter()
        of_prompts = lambda array: None if array is None else np.asarray(array)[: len(prompts)]  # noqa: E731
        return Generation(
            tokens=list(np.asarray(decoded.tokens)[: len(prompts)]),
            prefill_seconds=filled - begun,
            decode_seconds=done - filled,
            depths=of_prompts(decoded.depths),
            kept=of_prompts(decoded.kept),
            compiled_flops=(decode.cost_analysis() or {}).get("flops"),
        )

    def _threshold(self, threshold: Optional[float]) -> Array:
        told = self.decoding.threshold if threshold is None and isinstance(self.decoding, EarlyExit) else threshold
        return jnp.float32(1.0 if told is None else told)

    def _compile(
        self, model: Model, batch: Prompts, key: PRNGKeyArray, max_tokens: int
    ) -> tuple[Callable[..., Any], Compiled]:
        prefill = jax.jit(functools.partial(self._prefill, max_tokens=max_tokens)).lower(model, batch).compile()
        caches = jax.block_until_ready(prefill(model, batch))
        decode = {type(None): self._decode, EarlyExit: self._decode_exits, SelfSpeculation: self._decode_drafts}
        run = functools.partial(decode[type(self.decoding)], max_tokens=max_tokens)
        lowered = jax.jit(run, donate_argnums=2).lower(self._unroll(model), batch, caches, key, self._threshold(None))
        return prefill, lowered.compile()

    def _prefill(self, model: Model, prompts: Prompts, max_tokens: int) -> Caches:
        """Caches of the unrolled model that hold the prompts, with room for the samples.

        Padding goes to no expert, and stands after every query until samples have taken its places.
        """
        rows, length = prompts.tokens.shape
        order_T = jnp.arange(length, dtype=jnp.int32)
        positions_BT = jnp.broadcast_to(order_T, (rows, length), out_sharding=P(BATCH_AXES, None))
        real_BT = (positions_BT < prompts.lengths[:, None]) & prompts.real[:, None]
        batch = token_batch(prompts.tokens, positions_BT, real_BT)
        drafted = self.decoding.length if isinstance(self.decoding, SelfSpeculation) else 0
        caches = init_caches(self.config, rows, length + max_tokens + drafted)
        filled = nnx.merge(self._graph, *model)(batch, mode="generate", caches=caches).caches
        return unrolled_caches(self.config, filled)

    def _decode(
        self, model: Model, prompts: Prompts, caches: Caches, key: PRNGKeyArray, limit: Array, *, max_tokens: int
    ) -> Decoded:
        """Of the unrolled model."""
        lm = nnx.merge(self._layers, *model)

        def step(batch: Batch, caches: Caches, number: Int[Array, ""]):
            out = lm(batch, mode="generate", caches=caches)
            return out.logits[:, 0], None, out.caches

        return self._token_by_token(step, prompts, caches, key, max_tokens)

    def _decode_exits(
        self, model: Model, prompts: Prompts, caches: Caches, key: PRNGKeyArray, limit: Array, *, max_tokens: int
    ) -> Decoded:
        lm, how = nnx.merge(self._layers, *model), self.decoding
        assert isinstance(how, EarlyExit)
        step = lambda batch, caches, number: exit_step(lm, how, batch, caches, limit, number, max_tokens)  # noqa: E731
        return self._token_by_token(step, prompts, caches, key, max_tokens)

    def _token_by_token(self, step, prompts: Prompts, caches: Caches, key: PRNGKeyArray, max_tokens: int) -> Decoded:
        """`step`: (batch of one token a row, caches, its number) → (logits, layers run, caches)."""
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompts.salts)

        def one(carry, number):
            before_B, token_B, position_B, caches = carry
            batch = token_batch(token_B[:, None], position_B[:, None], prompts.real[:, None], before_B[:, None])
            logits_BV, depth_B, caches = step(batch, caches, number)
            next_B = self._draw(logits_BV, keys_B, position_B)
            return (token_B, next_B, position_B + 1, caches), (next_B, depth_B)

        start = (prompts.before, prompts.last, prompts.lengths, caches)
        (*_, caches), found_TB = jax.lax.scan(one, start, jnp.arange(max_tokens))
        tokens_BT, depths_BT = jax.tree.map(lambda a: jax.sharding.reshard(a.T, P(None, None)), found_TB)
        return Decoded(tokens=tokens_BT, caches=caches, depths=depths_BT)

    def _decode_drafts(
        self, model: Model, prompts: Prompts, caches: Caches, key: PRNGKeyArray, limit: Array, *, max_tokens: int
    ) -> Decoded:
        lm, how = nnx.merge(self._layers, *model), self.decoding
        assert isinstance(how, SelfSpeculation)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompts.salts)
        order = jnp.arange(how.length + 1)

        def one(carry):
            tokens_BT, done_B, kept_Bm, token_B, before_B, caches = carry
            place_B, unfinished_B = prompts.lengths + done_B, done_B < max_tokens
            where = token_B, before_B, place_B, prompts.real, caches, keys_B
            found = speculate(lm, how, self.sampling, self.vocab_size, *where, token_batch)
            said = lambda number: jnp.where(number[..., None] == order, found.tokens[:, None], 0).sum(-1)  # noqa: E731
            number_BT = jnp.arange(max_tokens) - done_B[:, None]
            new_BT = (number_BT >= 0) & (number_BT < found.kept[:, None])
            tokens_BT = jnp.where(new_BT, said(number_BT), tokens_BT)
            kept_Bm += (order == found.kept[:, None] - 1) & unfinished_B[:, None]
            last_B, second_B = (said(found.kept[:, None] - back)[:, 0] for back in (1, 2))
            second_B = jnp.where(found.kept > 1, second_B, token_B)
            moved = lambda new, old: jnp.where(unfinished_B, new, old)  # noqa: E731
            done_B = moved(done_B + found.kept, done_B)
            return tokens_BT, done_B, kept_Bm, moved(last_B, token_B), moved(second_B, before_B), found.caches

        zero_B = jnp.zeros_like(prompts.lengths)
        empty = [jnp.zeros_like(zero_B[:, None] + jnp.arange(n)) for n in (max_tokens, len(order))]
        start = empty[0], zero_B, empty[1], prompts.last, prompts.before, caches
        going = lambda carry: ((carry[1] < max_tokens) & prompts.real).any()  # noqa: E731
        tokens_BT, _, kept_Bm, *_, caches = jax.lax.while_loop(going, one, start)
        whole = lambda array: jax.sharding.reshard(array, P(None, None))  # noqa: E731
        return Decoded(tokens=whole(tokens_BT), caches=caches, kept=whole(kept_Bm))

    def _draw(
        self, logits_BV: Float[Array, "B V"], keys_B: PRNGKeyArray, position_B: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """One token per row, with a key of its own at every position."""

        def of_row(key: PRNGKeyArray, position: Int[Array, ""], logits_V: Float[Array, " V"]) -> Int[Array, ""]:
            return sample(jax.random.fold_in(key, position), logits_V[: self.vocab_size], self.sampling)

        by_row, whole = P(BATCH_AXES), P(BATCH_AXES, None)
        draw = jax.shard_map(jax.vmap(of_row), in_specs=(by_row, by_row, whole), out_specs=by_row)
        return draw(keys_B, position_B, jax.sharding.reshard(logits_BV, whole))
