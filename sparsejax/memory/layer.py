"""The lookup layer: address, fetch, value, consume. The table is whoever's that fetches."""

import dataclasses
from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.reports import MemoryReport
from sparsejax.base.sharding import BATCH_AXES, on_each_device, split_axes, sum_over, whole
from sparsejax.base.structs import Batch, struct
from sparsejax.memory.address import Addresses, Inputs, Running
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consume import Surroundings
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import RMSNorm
from sparsejax.ops.loads import count_loads
from sparsejax.ops.windows import remembered

Fetch = Callable[[Int[Array, "B T K"]], Float[Array, "B T K E"]]
"""Rows of the layer's table; zeros for −1."""


@struct
class MemoryCache:
    """What a lookup layer remembers of the tokens before, zeros for nothing (leading axes: repeats of the layer)."""

    address: Optional[Int[Array, "..."]] = None
    consume: Optional[Float[Array, "..."]] = None


@struct
class MemoryOutput:
    """`delta` is to be added to the residual stream; it is 0 in padding."""

    delta: Float[Array, "B T D"]
    report: MemoryReport
    cache: Optional[MemoryCache] = None


class MemoryLayer(nnx.Module):
    """One layer of a memory, without its table."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, vocab_size: int, spec: MemorySpec):
        address_key, running_key, consume_key = jax.random.split(key, 3)
        self.norm = RMSNorm(backbone.d_model, backbone.norm_epsilon) if spec.own_norm else None
        self.address = nnx.Dict(spec.address.init(address_key, backbone))
        running = spec.address.first_running(running_key, backbone)
        self.running = None if running is None else Running(running, axes=(None,) * running.ndim)
        self.consume: Any = spec.consume.build(consume_key, backbone, spec.value_width(backbone))
        self.vocab_size, self.spec = vocab_size, spec

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        batch: Batch,
        fetch: Fetch,
        *,
        h_BTD: Optional[Float[Array, "B T D"]] = None,
        embedded_BTD: Optional[Float[Array, "B T D"]] = None,
        cache: Optional[MemoryCache] = None,
    ) -> MemoryOutput:
        """Looks up and consumes.

        Args:
          x_BTD: the residual stream.
          h_BTD: its normalised form, where the layer has no norm of its own (`MemorySpec.own_norm`).
          embedded_BTD: the output of the model's embedding, if the consumption reads it.
          cache: what was remembered of the tokens before the rows; each row is then one document.
        """
        if self.norm is not None:
            h_BTD = self.norm(x_BTD)
        h_BTD = x_BTD if h_BTD is None else h_BTD  # where nothing reads more of it than its shape
        windows = MemoryCache() if cache is None else cache
        with jax.named_scope("address"):
            addresses, report = self.look_up(batch, h_BTD, windows.address)
        with jax.named_scope("fetch"):
            rows_BTKE = fetch(addresses.ids)
        with jax.named_scope("consume"):
            weights, found_BTK = addresses.weights, (addresses.ids >= 0).astype(jnp.float32)  # split as ids are
            weights_BTK = found_BTK if weights is None else weights
            value_BTV = self.spec.content.value(h_BTD, rows_BTKE, weights_BTK)
            around = Surroundings(
                x=x_BTD, h=h_BTD, segments=batch.segments, embedded=embedded_BTD, window=windows.consume
            )
            consumed = self.consume(value_BTV, around)
        real_BT = batch.segments > 0
        if consumed.gate is not None:
            report = dataclasses.replace(report, gate_sum=jnp.where(real_BT, consumed.gate, 0).sum(dtype=jnp.float32))
        return MemoryOutput(
            delta=jnp.where(real_BT[..., None], consumed.delta, 0).astype(x_BTD.dtype),
            report=report,
            cache=None if cache is None else _remembered(cache, addresses.recent, consumed.recent, real_BT),
        )

    def look_up(
        self, batch: Batch, h_BTD: Optional[Float[Array, "B T D"]], window: Optional[Int[Array, "B N *x"]] = None
    ) -> tuple[Addresses, MemoryReport]:
        """(addresses, what is known of them). `h_BTD` may be None where they are known from the input."""
        spec, vocab_size = self.spec, self.vocab_size
        variables = {name: variable[...] for name, variable in self.address.items()}
        if self.running is not None:
            variables["running"] = jax.lax.stop_gradient(self.running[...])
        stored = {name: split_axes(value) for name, value in variables.items()}

        def local(inputs: Inputs, variables: dict[str, Array]) -> tuple[Any, ...]:
            gathered = {name: whole(value, stored[name], inputs.tokens) for name, value in variables.items()}
            found = spec.address(inputs, gathered, vocab_size)
            counts = MemoryReport(
                loads=count_loads(found.ids, spec.rows(vocab_size)),
                lookups=(found.ids >= 0).sum(dtype=jnp.int32),
                tokens=inputs.real.sum(dtype=jnp.int32),
                masked=(~inputs.real).sum(dtype=jnp.int32),
                measured=found.measured,
                probability_sum=found.probability_sum,
            )
            return found.ids, found.weights, found.recent, sum_over(counts, BATCH_AXES)

        by_row: Any = P(BATCH_AXES)
        inputs = Inputs(tokens=batch.tokens, segments=batch.segments, h=h_BTD, window=window)
        specs = (jax.tree.map(lambda _: by_row, inputs), stored)
        ids, weights, recent, report = on_each_device(local, specs, (by_row, by_row, by_row, P()))(inputs, variables)
        return Addresses(ids=ids, weights=weights, recent=recent), report


def early_ids(
    spec: MemorySpec, batch: Batch, vocab_size: int, window: Optional[Int[Array, "B N *x"]] = None
) -> Int[Array, "B T K"]:
    """The addresses of a memory that are known from the input (`Address.known_at`): the same in all of its layers."""
    by_row: Any = P(BATCH_AXES)
    inputs = Inputs(tokens=batch.tokens, segments=batch.segments, window=window)
    local = lambda inputs: (spec.address(inputs, {}, vocab_size).ids,)  # noqa: E731
    return on_each_device(local, (jax.tree.map(lambda _: by_row, inputs),), (by_row,))(inputs)[0]


def empty_cache(spec: MemorySpec, backbone: Backbone, rows: int) -> MemoryCache:
    """Of `rows` rows before their first token, rows split over the batch axes."""

    def zeros(shape: Optional[tuple[int, ...]], dtype: str) -> Optional[Array]:
        if shape is None:
            return None
        return jnp.zeros((rows, *shape), dtype, out_sharding=P(BATCH_AXES, *[None] * len(shape)))

    return MemoryCache(
        address=zeros(spec.address.window, "int32"), consume=zeros(spec.consume.window(backbone), backbone.dtype)
    )


def _remembered(
    cache: MemoryCache, address: Optional[Array], consume: Optional[Array], real_BT: Bool[Array, "B T"]
) -> MemoryCache:
    """The windows after these tokens."""

    def moved(window: Optional[Array], recent: Optional[Array]) -> Optional[Array]:
        if window is None or recent is None:
            return window
        rows: Any = P(BATCH_AXES)
        run = on_each_device(lambda *operands: (remembered(*operands),), (rows, rows, rows), (rows,))
        return run(recent, real_BT, window)[0]

    return MemoryCache(address=moved(cache.address, address), consume=moved(cache.consume, consume))
