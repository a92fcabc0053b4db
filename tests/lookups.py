"""Small lookup layers, one for every entry of the memory's registries, run with an array as their table."""

import dataclasses
import functools
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.base.reports import MemoryReport
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct
from sparsejax.memory.addresses import ADDRESSES
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import CONSUMES
from sparsejax.memory.contents import CONTENTS
from sparsejax.memory.layer import MemoryCache, MemoryLayer
from sparsejax.model.config import ModelConfig

from support import host_params, to_numpy

WIDTH, VOCAB = 8, 32
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2, vocab_size=VOCAB)

SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "token_id": {"token_id": {}, "hashed_id": {"buckets": 7, "hashes": 2}},
    "n_grams": {"n_grams": {"orders": (1, 2, 3), "heads": 2, "buckets": 11}},
    "hyperplanes": {"hyperplanes": {"bits": 3, "hashes": 2}},
    "euclidean": {"euclidean": {"projections": 3, "width": 2.0, "buckets": 8, "hashes": 2}},
    "cross_polytope": {"cross_polytope": {"columns": 4, "hashes": 2}},
    "softmax": {"softmax_1": {"entries": 6}, "softmax_3": {"entries": 6, "k": 3, "weight": "share"}},
    "product_keys": {
        "product_keys": {"keys": 4, "heads": 2, "k": 3, "width": 4},
        "product_keys_normed": {"keys": 4, "heads": 2, "k": 3, "width": 4, "norm_query": True},
        "product_keys_relu": {"keys": 4, "heads": 2, "k": 1, "width": 4, "weight": "relu"},
    },
    "clusters": {"clusters": {"clusters": 5, "heads": 2}},
    "latent_bigrams": {"latent_bigrams": {"clusters": 4, "heads": 2, "buckets": 10}},
    "vector": {"vector": {}, "concat": {"size": 4, "join": "concat"}},
    "partial_expert": {"partial_expert": {"rank": 3}},
    "gate_row": {"gate_row": {"d_ff": 16}},
    "key_values": {"key_values": {"pairs": 2}},
}
"""Settings of an entry, by the name of a test; an entry that is not named has its defaults."""


def variants(registry: Any) -> dict[str, Any]:
    """Entries of the registry by the name of a test."""
    return {
        name: registry[entry](**settings)
        for entry in registry
        for name, settings in SMALL.get(entry, {entry: {}}).items()
    }


def grid() -> dict[str, MemorySpec]:
    """Every address with a plain vector; every content with the first consumption that takes it, every consumption with
    the first content that it takes."""
    addresses, contents, consumes = map(variants, (ADDRESSES, CONTENTS, CONSUMES))
    by_address = {name: MemorySpec(address=address) for name, address in addresses.items()}

    def fits(content: str, consume: str) -> bool:
        width = contents[content].value_width(BACKBONE, 3)
        full = width == WIDTH or not consumes[consume].full_width
        return contents[content].kind in consumes[consume].accepts and full

    names = [(content, next(consume for consume in consumes if fits(content, consume))) for content in contents]
    names += [(next(content for content in contents if fits(content, consume)), consume) for consume in consumes]
    pairs = {
        f"{content}-{consume}": {"content": contents[content], "consume": consumes[consume]}
        for content, consume in names
    }
    several, one = addresses["softmax_3"], addresses["token_id"]
    unweighted = MemorySpec(address=one, content=contents["vector"], consume=consumes["concat"])
    weighted = {name: MemorySpec(address=several, **pair) for name, pair in pairs.items()}
    return by_address | weighted | {"unweighted-concat": unweighted}


GRID = grid()


def start(spec: MemorySpec, seed: int = 0) -> nnx.State:
    """The layer's variables before the first step, NumPy arrays."""
    return host_params(lambda key: MemoryLayer(key, BACKBONE, VOCAB, spec), seed)


def trained(spec: MemorySpec, seed: int = 0) -> nnx.State:
    """As if it had been trained: every learned number is random."""
    rng = np.random.default_rng(seed)

    def drawn(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        return variable.replace(rng.normal(size=variable.shape).astype(np.float32) * variable.shape[0] ** -0.5)

    return jax.tree.map(drawn, start(spec, seed), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def random_table(spec: MemorySpec, seed: int = 0) -> np.ndarray:
    shape = (spec.rows(VOCAB), spec.row_width(BACKBONE))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def first_table(spec: MemorySpec, seed: int = 0) -> np.ndarray:
    """A table as it is before the first step."""
    rng, rows = np.random.default_rng(seed), spec.rows(VOCAB)
    parts = [rng.normal(size=(rows, part.width)) * part.stddev for part in spec.row_parts(BACKBONE)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _rows(ids_BTK: jax.Array, table: jax.Array, places: jax.Array) -> jax.Array:
    """Row i is at `places[i]` of a table that every device has."""
    by_row: Any = P(BATCH_AXES)

    def local(ids, table, places):
        return jnp.where(ids[..., None] >= 0, table[places[jnp.maximum(ids, 0)]], 0)

    return jax.shard_map(local, in_specs=(by_row, P(), P()), out_specs=by_row)(ids_BTK, table, places)


@struct
class Outcome:
    """What the layer returned, and what it asked for."""

    delta: Any
    report: MemoryReport
    cache: Optional[MemoryCache]
    ids: Any


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Of a function of the layer's output: with respect to its variables, the table, the rows fetched and the input."""

    variables: Any
    table: Any
    rows: Any
    x: Any


@functools.cache
def runner(spec: MemorySpec):
    """The compiled layer: (variables, table, x, batch, places=None, cache=None) → (output, gradients)."""
    graph = nnx.graphdef(jax.eval_shape(lambda: MemoryLayer(jax.random.key(0), BACKBONE, VOCAB, spec)))

    @jax.jit
    def run(variables: nnx.State, table: Any, x: Any, batch: Batch, places: Any, cache: Optional[MemoryCache]):
        def of(variables, table, more, x) -> tuple[jax.Array, Outcome]:
            asked = []

            def fetch(ids):
                asked.append(ids)
                return _rows(ids, table, places) + more

            out = nnx.merge(graph, variables)(
                x,
                batch,
                fetch,
                h_BTD=None if spec.own_norm else x,
                embedded_BTD=x * 0.5 if spec.consume.reads_embedding else None,
                cache=cache,
            )
            outcome = Outcome(delta=out.delta, report=out.report, cache=out.cache, ids=asked[0])
            return jnp.square(out.delta).sum() + out.delta.sum(), outcome

        shape = (*x.shape[:2], spec.address.lookups, table.shape[1])
        more = jnp.zeros(shape, out_sharding=P(BATCH_AXES))
        gradients, out = jax.grad(of, argnums=(0, 1, 2, 3), has_aux=True)(variables, table, more, x)
        return out, gradients

    def call(variables, table, x, batch, places=None, cache=None) -> tuple[Outcome, Gradients]:
        places = np.arange(len(table)) if places is None else places
        out, gradients = to_numpy(run(variables, table, x, batch, places, cache))
        return out, Gradients(**dict(zip(("variables", "table", "rows", "x"), gradients, strict=True)))

    return call
