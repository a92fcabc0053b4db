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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch
from sparsejax.infer.prompts import Prompts, check_prompts, place_prompts
from sparsejax.infer.sampling import Sampling, sample
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches
from sparsejax.model.stack import Caches
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

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens of all prompts per second of decoding."""
        return sum(len(row) for row in self.tokens) / max(self.decode_seconds, 1e-9)


class Generator:
    """Continues prompts with models of one config. No token is dropped for want of capacity.

    To be used inside `jax.set_mesh`. What it runs is compiled once for each shape: rows, padded length, `max_tokens`.
    Ids from `vocab_size` on are never sampled: a model may have more embeddings than its tokenizer has tokens.
    """

    def __init__(self, config: ModelConfig, sampling: Sampling, vocab_size: Optional[int] = None):
        self.config, self.sampling = config, sampling
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self._graph = abstract_model(config)[0]
        self._compiled: dict[tuple[int, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def __call__(
        self, variables: Variables, prompts: Sequence[np.ndarray], max_tokens: int, seed: int = 0
    ) -> Generation:
        """`max_tokens` more tokens for each prompt, beyond the length that the model was trained on if need be.

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
        filled = time.perf_counter()
        tokens_BT, _ = jax.block_until_ready(decode(model, batch, caches, key))
        done = time.perf_counter()
        tokens = list(np.asarray(tokens_BT)[: len(prompts)])
        return Generation(tokens=tokens, prefill_seconds=filled - begun, decode_seconds=done - filled)

    def _compile(
        self, model: Model, batch: Prompts, key: PRNGKeyArray, max_tokens: int
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        prefill = jax.jit(functools.partial(self._prefill, max_tokens=max_tokens)).lower(model, batch).compile()
        caches = jax.block_until_ready(prefill(model, batch))
        decode = jax.jit(functools.partial(self._decode, max_tokens=max_tokens), donate_argnums=2)
        return prefill, decode.lower(model, batch, caches, key).compile()

    def _prefill(self, model: Model, prompts: Prompts, max_tokens: int) -> Caches:
        """Caches that hold the prompts, with room for the samples.

        Padding goes to no expert, and stands after every query until samples have taken its places.
        """
        rows, length = prompts.tokens.shape
        order_T = jnp.arange(length, dtype=jnp.int32)
        positions_BT = jnp.broadcast_to(order_T, (rows, length), out_sharding=P(BATCH_AXES, None))
        real_BT = (positions_BT < prompts.lengths[:, None]) & prompts.real[:, None]
        batch = _batch(prompts.tokens, positions_BT, real_BT)
        caches = init_caches(self.config, rows, length + max_tokens)
        return nnx.merge(self._graph, *model)(batch, mode="generate", caches=caches).caches

    def _decode(
        self, model: Model, prompts: Prompts, caches: Caches, key: PRNGKeyArray, max_tokens: int
    ) -> tuple[Int[Array, "B T"], Caches]:
        """(samples, caches). The caches are returned so that their memory is used again."""
        lm = nnx.merge(self._graph, *model)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompts.salts)

        def step(carry, _):
            before_B, token_B, position_B, caches = carry
            batch = _batch(token_B[:, None], position_B[:, None], prompts.real[:, None], before_B[:, None])
            out = lm(batch, mode="generate", caches=caches)
            next_B = self._draw(out.logits[:, 0], keys_B, position_B)
            return (token_B, next_B, position_B + 1, out.caches), next_B

        start = (prompts.before, prompts.last, prompts.lengths, caches)
        (*_, caches), tokens_TB = jax.lax.scan(step, start, length=max_tokens)
        return jax.sharding.reshard(tokens_TB.T, P(None, None)), caches

    def _draw(
        self, logits_BV: Float[Array, "B V"], keys_B: PRNGKeyArray, position_B: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """One token per row, with a key of its own at every position."""

        def of_row(key: PRNGKeyArray, position: Int[Array, ""], logits_V: Float[Array, " V"]) -> Int[Array, ""]:
            return sample(jax.random.fold_in(key, position), logits_V[: self.vocab_size], self.sampling)

        by_row, whole = P(BATCH_AXES), P(BATCH_AXES, None)
        draw = jax.shard_map(jax.vmap(of_row), in_specs=(by_row, by_row, whole), out_specs=by_row)
        return draw(keys_B, position_B, jax.sharding.reshard(logits_BV, whole))


def _batch(
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    real_BT: Bool[Array, "B T"],
    previous_BT: Optional[Int[Array, "B T"]] = None,
) -> Batch:
    """A batch without targets, each row one document."""
    nothing = jnp.zeros_like(tokens_BT)
    return Batch(
        tokens=tokens_BT,
        targets=nothing,
        segments=real_BT.astype(jnp.int32),
        positions=positions_BT,
        loss_mask=nothing > 0,
        domains=nothing,
        rows=nothing[:, 0],
        previous=previous_BT,
    )
