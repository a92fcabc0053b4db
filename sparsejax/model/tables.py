"""Lookup tables in the model: how many there are of each, who reads which, and the gradients of what was read.

A memory's tables are one variable, of the layers that have the memory one after the other, or of a single table that
they share. They lie outside the scanned stack, which would copy whole tables from step to step."""

from collections.abc import Mapping
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import BlockCache
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.layer import early_ids
from sparsejax.model.config import EMBEDDING, ModelConfig
from sparsejax.nn.table import ROWS_SPEC, Given, Reader, RowGradients, Table, read_tables

Into = Mapping[str, Mapping[str, Float[Array, "*R B T K E"]]]
"""Position → memory → zeros, whose gradient is that of the rows read there."""
Reads = Mapping[str, Mapping[str, Int[Array, "*R B T K"]]]
"""Position → memory → numbers of the rows read there."""


def build_tables(key: PRNGKeyArray, config: ModelConfig) -> nnx.Dict:
    """Memory → its `Table`."""

    def table(number: int, name: str, spec: MemorySpec) -> Table:
        parts = [(part.width, part.stddev) for part in spec.row_parts(config)]
        layers = 1 if spec.shared else len(layers_of(config, name))
        return Table(jax.random.fold_in(key, number), layers, spec.rows(config.vocab_size), parts, spec.storage)

    return nnx.Dict({name: table(i, name, spec) for i, (name, spec) in enumerate(sorted(config.memory.items()))})


def layers_of(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The layers that have this memory, ascending; layer 0 stands for the embedding."""
    spec = config.memory[name]
    if spec.place == EMBEDDING:
        return (0,)
    return tuple(layer.index for layer in config.layers if layer.block in spec.blocks)


@struct
class Prefetched:
    """Rows of the memories whose addresses the input tells, read before the first layer runs: what takes its time, the
    memory of the host or other devices, has it while the layers before are computed."""

    own: Mapping[str, Mapping[str, Float[Array, "*R B T K E"]]]  # position → memory, of tables that are not shared
    shared: Mapping[str, Float[Array, "B T K E"]]
    rounds: Mapping[str, Int[Array, ""]]

    def rows(self, position: str, name: str) -> Float[Array, "*R B T K E"]:
        return self.shared[name] if name in self.shared else self.own[position][name]

    def stacked(self) -> dict[str, Mapping[str, Float[Array, "R B T K E"]]]:
        """What is of the pattern's repeats."""
        return {position: rows for position, rows in self.own.items() if position.startswith("pattern")}


NOTHING_READ = Prefetched(own={}, shared={}, rounds={})
"""Layers then read for themselves."""


def prefetch(
    config: ModelConfig, tables: Mapping[str, Table], batch: Batch, caches: Optional[Mapping[str, BlockCache]] = None
) -> Prefetched:
    """One reading of each memory whose addresses are known from the input, for all of its layers together."""
    own: dict[str, dict[str, Array]] = {position: {} for position in config.memory_positions}
    shared, rounds = {}, {}
    for name, spec in config.memory.items():
        if spec.address.known_at != "input":
            continue
        positions = [position for position in config.memory_positions if name in config.memories_at(position)]
        table_LWE = tables[name].rows[...]
        with jax.named_scope(f"memory/{name}/prefetch"):
            ids_BTK = early_ids(spec, batch, config.vocab_size, _window(caches, positions[0], name))
            every = jnp.arange(table_LWE.shape[0], dtype=jnp.int32)
            rows_LBTKE, rounds[name] = read_tables(table_LWE, every, ids_BTK, config.dtype)
        if spec.shared:
            shared[name] = rows_LBTKE[0]
            continue
        for position in positions:
            of_these = _tables_at(config, name, position)
            own[position][name] = rows_LBTKE[of_these] if position.startswith("pattern") else rows_LBTKE[of_these[0]]
    return Prefetched(own=own, shared=shared, rounds=rounds)


def _window(caches: Optional[Mapping[str, BlockCache]], position: str, name: str) -> Optional[Int[Array, "B N *x"]]:
    """What a memory's address remembers, which is the same in all of its layers."""
    window = None if caches is None else caches[position].memory[name].address
    return window[0] if window is not None and position.startswith("pattern") else window


def readers(
    config: ModelConfig,
    tables: Mapping[str, Table],
    prefetched: Prefetched,
    position: str,
    layer: int | Int[Array, ""],
    into: Optional[Mapping[str, Array]],
) -> dict[str, Reader | Given]:
    """Memory → the reader of the layer's table, for the memories at a position; what `prefetched` holds of a pattern is
    of one repeat."""

    def reader(name: str) -> Reader | Given:
        goes = None if into is None else into[name]
        if name in prefetched.rounds:
            return Given(rows=prefetched.rows(position, name), rounds=prefetched.rounds[name], into=goes)
        return Reader(rows_LWE=tables[name].rows[...], layer=jnp.asarray(_table_of(config, name))[layer], into=goes)

    return {name: reader(name) for name in config.memories_at(position)}


def row_zeros(config: ModelConfig, rows: int, length: int) -> dict[str, dict[str, Array]]:
    """`Into` for batches of this shape."""

    def zeros(position: str, name: str) -> Array:
        spec, stacked = config.memory[name], position.startswith("pattern")
        shape = (rows, length, spec.address.lookups, spec.row_width(config))
        shape = (config.repeats, *shape) if stacked else shape
        return jnp.zeros(shape, config.dtype, out_sharding=P(*(None,) * stacked, *ROWS_SPEC))

    return {p: {n: zeros(p, n) for n in config.memories_at(p)} for p in config.memory_positions}


def row_gradients(config: ModelConfig, reads: Reads, gradients: Into) -> dict[str, RowGradients]:
    """Memory → all that was read of its tables. Arrays may have further leading axes, before those of `Reads`."""

    def of_position(position: str, name: str) -> tuple[Array, Array, np.ndarray]:
        ids, rows = reads[position][name], gradients[position][name]
        tables = _tables_at(config, name, position)
        readings = int(np.prod(ids.shape[:-3]))
        ids, rows = ids.reshape(readings, *ids.shape[-3:]), rows.reshape(readings, *rows.shape[-4:])
        return ids, rows, np.tile(tables, readings // len(tables))

    found = {}
    for name in config.memory:
        parts = [of_position(p, name) for p in config.memory_positions if name in config.memories_at(p)]
        ids, rows, layer = zip(*parts, strict=True)
        found[name] = RowGradients(
            ids=jnp.concatenate(ids), rows=jnp.concatenate(rows), layer=jnp.asarray(np.concatenate(layer), jnp.int32)
        )
    return found


def _tables_at(config: ModelConfig, name: str, position: str) -> np.ndarray:
    """Which of the memory's tables the layers of a position read, one for every repeat."""
    layers = [layer.index for layer in config.layers if layer.position == position] or [0]
    return _table_of(config, name)[np.array(layers)]


def _table_of(config: ModelConfig, name: str) -> np.ndarray:
    """Layer of the model → which of the memory's tables it reads, int32."""
    numbers = np.zeros(config.num_layers, np.int32)
    for number, layer in enumerate(layers_of(config, name)):
        numbers[layer] = 0 if config.memory[name].shared else number
    return numbers
