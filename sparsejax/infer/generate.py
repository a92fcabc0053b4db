"""Continuations of prompts, sampled or given: one pass over the prompts fills the caches, then a compiled loop adds
token after token."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch
from sparsejax.infer.decoded import Decoded, Generation, Scores, Variables
from sparsejax.infer.early_exit import EarlyExit, begun, exit_step
from sparsejax.infer.exit_recompute import Owing
from sparsejax.infer.prompts import Prompts, check_prompts, place_prompts, token_batch
from sparsejax.infer.sampling import Sampling, sample
from sparsejax.infer.self_speculation import SelfSpeculation, speculate
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.model.stack import Caches
from sparsejax.model.unrolled import unrolled, unrolled_caches, unrolled_variables
from sparsejax.ops.losses import cross_entropies
from sparsejax.train.state import abstract_model

Model = tuple[nnx.State, nnx.State]
"""Parameters and other variables."""


Decoding = EarlyExit | SelfSpeculation


class Asked(NamedTuple):
    """What a compiled decoder is given beside model and caches."""

    prompts: Prompts
    key: PRNGKeyArray
    limit: Array  # threshold of early exits
    forced_BT: Optional[Array]  # tokens that stand in for samples


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
        decoded, (filling, decoding), flops = self._run(variables, prompts, max_tokens, seed, threshold)
        of_prompts = lambda array: None if array is None else np.asarray(array)[: len(prompts)]  # noqa: E731
        return Generation(
            tokens=list(np.asarray(decoded.tokens)[: len(prompts)]),
            prefill_seconds=filling,
            decode_seconds=decoding,
            depths=of_prompts(decoded.depths),
            kept=of_prompts(decoded.kept),
            compiled_flops=flops,
        )

    def score(
        self,
        variables: Variables,
        prompts: Sequence[np.ndarray],
        continuations: Sequence[np.ndarray],
        threshold: Optional[float] = None,
    ) -> Scores:
        """What each continuation loses after its prompt, decoded token by token as samples would be: with early exits,
        by the exits that tokens leave at and the keys that they leave behind.

        Raises:
          RequestError: as for samples, or the decoder drafts, which changes nothing that a token loses.
        """
        if isinstance(self.decoding, SelfSpeculation):
            raise RequestError("drafts change no probability; score without them")
        check_prompts(prompts, self.config.vocab_size)
        check_prompts(continuations, self.config.vocab_size)
        if len(continuations) != len(prompts):
            raise RequestError(f"{len(continuations)} continuations of {len(prompts)} prompts")
        lengths = [len(row) for row in continuations]
        given = np.zeros((len(prompts), max(lengths)), np.int32)
        for row, tokens in zip(given, continuations, strict=True):
            row[: len(tokens)] = tokens
        decoded, (_, seconds), flops = self._run(variables, prompts, max(lengths), 0, threshold, given)
        cut = lambda array: [np.asarray(row)[:n] for row, n in zip(array, lengths, strict=False)]  # noqa: E731
        depths = None if decoded.depths is None else cut(decoded.depths)
        return Scores(nll=cut(decoded.nll), decode_seconds=seconds, depths=depths, compiled_flops=flops)

    def _run(
        self,
        variables: Variables,
        prompts: Sequence[np.ndarray],
        max_tokens: int,
        seed: int,
        threshold: Optional[float],
        given: Optional[np.ndarray] = None,
    ) -> tuple[Decoded, tuple[float, float], Optional[float]]:
        """(what was decoded, seconds of prefill and decoding, XLA's count of FLOPs). `given`: tokens that stand in for
        samples."""
        model = (variables.params, variables.model_state)
        batch, key = place_prompts(prompts, jax.sharding.get_mesh()), jax.random.key(seed)
        rows = batch.tokens.shape[0]
        forced = None if given is None else jnp.zeros((rows, max_tokens), jnp.int32).at[: len(given)].set(given)
        asked = Asked(batch, key, self._threshold(threshold), forced)
        shape = (*batch.tokens.shape, max_tokens, given is not None)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(model, asked, max_tokens)
        prefill, decode = self._compiled[shape]
        # One program at a time, waited for: on CPU, two with collectives in flight can deadlock.
        begun = time.perf_counter()
        caches = jax.block_until_ready(prefill(model, batch))
        layers = jax.block_until_ready(self._unroll(model))
        filled = time.perf_counter()
        decoded: Decoded = jax.block_until_ready(decode(layers, caches, asked))
        seconds = filled - begun, time.perf_counter() - filled
        return decoded, seconds, (decode.cost_analysis() or {}).get("flops")

    def _threshold(self, threshold: Optional[float]) -> Array:
        told = self.decoding.threshold if threshold is None and isinstance(self.decoding, EarlyExit) else threshold
        return jnp.float32(1.0 if told is None else told)

    def _compile(self, model: Model, asked: Asked, max_tokens: int) -> tuple[Callable[..., Any], Compiled]:
        prefill = jax.jit(functools.partial(self._prefill, max_tokens=max_tokens)).lower(model, asked.prompts).compile()
        caches = jax.block_until_ready(prefill(model, asked.prompts))
        decode = {type(None): self._decode, EarlyExit: self._decode_exits, SelfSpeculation: self._decode_drafts}
        run = functools.partial(decode[type(self.decoding)], max_tokens=max_tokens)
        return prefill, jax.jit(run, donate_argnums=1).lower(self._unroll(model), caches, asked).compile()

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

    def _decode(self, model: Model, caches: Caches, asked: Asked, *, max_tokens: int) -> Decoded:
        """Of the unrolled model."""
        lm = nnx.merge(self._layers, *model)

        def step(batch: Batch, caches: Caches, number: Int[Array, ""]):
            out = lm(batch, mode="generate", caches=caches)
            return out.logits[:, 0], None, out.caches

        return self._token_by_token(step, caches, asked, max_tokens)

    def _decode_exits(self, model: Model, caches: Caches, asked: Asked, *, max_tokens: int) -> Decoded:
        lm, how = nnx.merge(self._layers, *model), self.decoding
        assert isinstance(how, EarlyExit)
        step = lambda batch, caches, number: exit_step(lm, how, batch, caches, asked.limit, number, max_tokens)  # noqa: E731
        return self._token_by_token(step, begun(lm, how, caches, asked.prompts.lengths), asked, max_tokens)

    def _token_by_token(self, step, held: Any, asked: Asked, max_tokens: int) -> Decoded:
        """`step`: (batch of one token a row, caches, its number) → (logits, layers run, caches). `held` are caches, or
        what holds them."""
        prompts, forced_BT = asked.prompts, asked.forced_BT
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(asked.key, prompts.salts)

        def one(carry, of_token):
            number, given_B = of_token
            before_B, token_B, position_B, held = carry
            batch = token_batch(token_B[:, None], position_B[:, None], prompts.real[:, None], before_B[:, None])
            logits_BV, depth_B, held = step(batch, held, number)
            next_B = self._draw(logits_BV, keys_B, position_B) if given_B is None else given_B
            nll_B = None if given_B is None else self._lost(logits_BV, next_B, prompts.real)
            return (token_B, next_B, position_B + 1, held), (next_B, depth_B, nll_B)

        start = (prompts.before, prompts.last, prompts.lengths, held)
        given_TB = None if forced_BT is None else jax.sharding.reshard(forced_BT, P(BATCH_AXES, None)).T
        (*_, caches), found_TB = jax.lax.scan(one, start, (jnp.arange(max_tokens), given_TB))
        caches = caches.caches if isinstance(caches, Owing) else caches
        tokens_BT, depths_BT, nll_BT = jax.tree.map(lambda a: jax.sharding.reshard(a.T, P(None, None)), found_TB)
        return Decoded(tokens=tokens_BT, caches=caches, depths=depths_BT, nll=nll_BT)

    def _decode_drafts(self, model: Model, caches: Caches, asked: Asked, *, max_tokens: int) -> Decoded:
        lm, how = nnx.merge(self._layers, *model), self.decoding
        assert isinstance(how, SelfSpeculation)
        prompts = asked.prompts
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(asked.key, prompts.salts)
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

    def _lost(
        self, logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"], real_B: Bool[Array, " B"]
    ) -> Float[Array, " B"]:
        """−log p of given tokens."""
        whole_BV = jax.sharding.reshard(logits_BV, P(BATCH_AXES, None))
        return cross_entropies(whole_BV[:, : self.vocab_size], token_B, real_B)

    def _draw(
        self, logits_BV: Float[Array, "B V"], keys_B: PRNGKeyArray, position_B: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """One token per row, with a key of its own at every position."""

        def of_row(key: PRNGKeyArray, position: Int[Array, ""], logits_V: Float[Array, " V"]) -> Int[Array, ""]:
            return sample(jax.random.fold_in(key, position), logits_V[: self.vocab_size], self.sampling)

        by_row, whole = P(BATCH_AXES), P(BATCH_AXES, None)
        draw = jax.shard_map(jax.vmap(of_row), in_specs=(by_row, by_row, whole), out_specs=by_row)
        return draw(keys_B, position_B, jax.sharding.reshard(logits_BV, whole))
