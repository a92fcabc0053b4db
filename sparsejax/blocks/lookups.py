"""Lookup layers in a block: those of one place are asked with the same input, and what they add is summed."""

import dataclasses
from collections.abc import Mapping
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.reports import MemoryReport
from sparsejax.blocks.context import BlockCache, Context
from sparsejax.memory.config import MemorySpec, Place
from sparsejax.memory.layer import MemoryCache, MemoryLayer
from sparsejax.nn.backbone import Backbone


def build_lookups(key: PRNGKeyArray, memory: Mapping[str, MemorySpec], backbone: Backbone, vocab_size: int) -> nnx.Dict:
    """A `MemoryLayer` for each spec, by name."""
    layer = lambda i, spec: MemoryLayer(jax.random.fold_in(key, i), backbone, vocab_size, spec)  # noqa: E731
    return nnx.Dict({name: layer(i, spec) for i, (name, spec) in enumerate(memory.items())})


class Lookups:
    """The lookup layers of a block in one forward pass; collects what they report."""

    def __init__(self, memories: Mapping[str, MemoryLayer], context: Context, cache: Optional[BlockCache]):
        self.memories, self.context, self.cache = memories, context, cache
        self.reports: dict[str, MemoryReport] = {}
        self.caches: dict[str, MemoryCache] = {}
        self.reads: dict[str, Int[Array, "B T K"]] = {}
        self.aside: dict[int, Float[Array, "B T D"]] = {}  # what other streams are to be given

    def at(
        self, place: Place, x_BTD: Float[Array, "B T D"], h_BTD: Optional[Float[Array, "B T D"]] = None
    ) -> Float[Array, "B T D"]:
        """The residual stream after the lookup layers of a place; `h_BTD` is its normalised form, if the block has made
        it."""
        after_BTD = x_BTD
        for name, layer in self.memories.items():
            if layer.spec.place != place:
                continue
            delta_BTD = self._ask(name, x_BTD, h_BTD)
            for stream in layer.spec.streams:
                if stream == 0:
                    after_BTD = after_BTD + delta_BTD
                else:
                    self.aside[stream] = self.aside[stream] + delta_BTD if stream in self.aside else delta_BTD
        return after_BTD

    def _ask(self, name: str, x_BTD: Array, h_BTD: Optional[Array]) -> Array:
        context, layer = self.context, self.memories[name]
        rounds: list[Int[Array, ""]] = []

        def fetch(ids_BTK: Int[Array, "B T K"]) -> Float[Array, "B T K E"]:
            found = context.readers[name](ids_BTK, x_BTD.dtype.name)
            self.reads[name] = ids_BTK
            rounds.append(found.rounds)
            return found.rows

        cache = None if self.cache is None else self.cache.memory[name]
        with jax.named_scope(f"memory/{name}"):
            out = layer(
                x_BTD,
                context.batch,
                fetch,
                h_BTD=h_BTD,
                embedded_BTD=context.embedded,
                cache=cache,
            )
        self.reports[name] = dataclasses.replace(out.report, fetches=jnp.ones_like(rounds[0]), rounds=rounds[0])
        if out.cache is not None:
            self.caches[name] = out.cache
        return out.delta
