"""What lookup layers owe in a model, all presets of them: several at once, in repeated layers and others."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.streams import OneStream
from sparsejax.memory import presets
from sparsejax.memory.clusters import Clusters, LatentBigrams
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.contents import GateRow, KeyValues, PartialExpert, Vector
from sparsejax.memory.learned import ProductKeys, Softmax
from sparsejax.memory.lsh import CrossPolytope, Euclidean, Hyperplanes
from sparsejax.memory.n_grams import NGrams
from sparsejax.memory.projections import Concat
from sparsejax.memory.token_ids import TokenId
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel, init_caches

from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    mesh_name,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

ROWS, LENGTH, VOCAB, WIDTH = 8, 10, 32, 16
KEYS = ProductKeys(keys=4, heads=2, k=3, width=8)
EVERYWHERE = ("first", "dense", "moe")
MODELS: dict[str, dict[str, MemorySpec]] = {
    "known_early": {
        "token_id": presets.token_id(blocks=EVERYWHERE),
        "engram": presets.engram(
            address=NGrams(heads=2, buckets=20), content=Vector(size=8, join="concat"), blocks=("first", "dense")
        ),
        "per_layer_embedding": presets.per_layer_embedding(content=Vector(size=8), blocks=EVERYWHERE),
        "stem": presets.stem(content=GateRow(d_ff=16), blocks=("dense",)),
        "over_encoding": presets.over_encoding(
            address=NGrams(heads=2, buckets=20), content=Vector(size=8, join="concat")
        ),
        "l3": presets.l3(content=KeyValues(pairs=2), blocks=("moe",), shared=True),
    },
    "known_late": {
        "lsh": presets.lsh(address=Hyperplanes(bits=4, hashes=2), blocks=EVERYWHERE),
        "product_key": presets.product_key(address=KEYS, blocks=("dense",)),
        "memory_plus": presets.memory_plus(address=KEYS, blocks=("first", "moe")),
        "n_grammer": presets.n_grammer(address=LatentBigrams(clusters=4, heads=4, buckets=20)),
        "clusters": MemorySpec(address=Clusters(clusters=8), consume=Concat(), blocks=("dense",), place="after"),
    },
    "experts": {
        "softmax": presets.softmax(address=Softmax(entries=8, k=2), blocks=("first", "moe")),
        "partial_experts": presets.partial_experts(
            address=TokenId(buckets=16), content=PartialExpert(rank=2), blocks=EVERYWHERE
        ),
        "peer": presets.peer(address=KEYS, blocks=("dense",), shared=True),
        "euclidean": MemorySpec(
            address=Euclidean(projections=3, buckets=8), blocks=("dense",), place="before_attention"
        ),
        "cross_polytope": MemorySpec(address=CrossPolytope(columns=4), blocks=("moe",), place="after"),
    },
    "into_streams": {
        "next": presets.token_id(blocks=EVERYWHERE, streams=(1,)),
        "both_others": presets.per_layer_embedding(content=Vector(size=8), blocks=("dense", "moe"), streams=(1, 2)),
        "all": presets.lsh(address=Hyperplanes(bits=4), blocks=("moe",), place="parallel", streams=(0, 2)),
    },
}
"""Small forms of presets by their names, and points of the grid that no preset has."""
RESIDUALS = {"into_streams": AltUp(streams=3)}
"""Of models that have more than one stream."""


def config_of(name, **changes):
    memory = {} if name is None else MODELS[name]
    changes = dict(changes)
    storage = changes.pop("storage", "replicated")
    memory = {key: MemorySpec(**{**spec.__dict__, "storage": storage}) for key, spec in memory.items()}
    moe = MoESpec(num_experts=4, d_ff=8, capacity_factor=4.0, eval_capacity_factor=4.0)
    blocks = {"first": DenseSpec(d_ff=16), "dense": DenseSpec(d_ff=16), "moe": moe}
    changes.setdefault("streams", RESIDUALS.get(name, OneStream()))
    shape = {"d_model": WIDTH, "num_heads": 2, "vocab_size": VOCAB, "prefix": ("first",), "pattern": ("dense", "moe")}
    return ModelConfig(**(shape | {"repeats": 2, "blocks": blocks, "memory": memory} | changes))


@functools.cache
def fresh(name):
    config = config_of(name)
    return host_params(lambda key: LanguageModel(key, config))


@functools.cache
def trained(name):
    """The same with random numbers for all that memories learn, tables included."""
    rng = np.random.default_rng(0)
    flat = dict(nnx.to_flat_state(fresh(name)))
    for path, variable in flat.items():
        if isinstance(variable, nnx.Param) and {"memories", "tables"} & set(path):
            fan_in = variable.shape[-2] if len(variable.shape) > 1 else 1
            drawn = rng.normal(size=variable.shape) * min(fan_in, 16) ** -0.5
            flat[path] = variable.replace(drawn.astype(np.float32))
    return nnx.from_flat_state(flat)


@functools.cache
def runner(name, **changes):
    config = config_of(name, **changes)
    graph = graph_of(lambda key: LanguageModel(key, config))

    def call(variables, batch, caches=None):
        mode = "eval" if caches is None else "generate"
        return nnx.merge(graph, variables)(batch, mode=mode, caches=caches)

    return jax.jit(call)


def stored_as(variables, config):
    """The same values, each with the logical axes that the config gives it."""
    values = dict(nnx.to_flat_state(variables))
    model = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), config))
    return nnx.from_flat_state((path, v.replace(values[path][...])) for path, v in nnx.to_flat_state(nnx.state(model)))


BATCH = host_batch(ROWS, LENGTH, VOCAB)


def run(name, variables, mesh=ONE_DEVICE, **changes):
    with on_mesh(mesh) as devices:
        stored = stored_as(variables, config_of(name, **changes))
        out = runner(name, **changes)(put_params(stored, devices), put_batch(BATCH, devices))
        return to_numpy(out)


@functools.cache
def plain(name):
    return run(name, trained(name))


def test_every_preset_is_in_a_model():
    assert set(presets.PRESETS) <= set(itertools.chain(*MODELS.values()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_begins_as_if_it_had_no_memory(name):
    """Bit for bit, and it does have some once it has learned."""
    without = run(None, fresh(None)).logits
    assert np.array_equal(run(name, fresh(name)).logits, without)
    assert np.abs(plain(name).logits - without).max() > 0.01


@pytest.mark.parametrize(
    "name",
    ["known_early", "known_late", *(pytest.param(n, marks=pytest.mark.slow) for n in ("experts", "into_streams"))],
)
def test_token_by_token_the_logits_are_the_same(name):
    """A prompt of 4, then one token after the other, from what the caches hold."""
    rows, prompt = 2, 4
    batch = host_batch(rows, LENGTH, VOCAB, documents=1, padded=0)
    config = config_of(name)
    with on_mesh(ONE_DEVICE) as mesh:
        placed, call = put_params(trained(name), mesh), runner(name)
        whole = to_numpy(call(placed, put_batch(batch, mesh)))
        caches, logits = init_caches(config, rows, LENGTH), []
        for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, LENGTH))]:
            part = {field: array if field == "rows" else array[:, begin:end] for field, array in batch.items()}
            out = call(placed, put_batch(part, mesh), caches)
            caches = out.caches
            logits.append(to_numpy(out.logits))
    assert_close(np.concatenate(logits, axis=1), whole.logits)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"scan": False}, {"remat": "full"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_however_the_stack_is_run(name, changes):
    """Logits, reports and ids of rows."""
    out, other = plain(name), run(name, trained(name), **changes)
    assert_close((other.logits, other.reports, other.reads), (out.logits, out.reports, out.reads))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["replicated", "rows", "features"])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 2, 1), (8, 1, 1)], ids=mesh_name)
@pytest.mark.parametrize("name", MODELS)
def test_on_eight_devices_it_is_the_same(name, mesh, storage):
    """Ids of rows exactly, however the tables are stored. Rounds of the exchange are the mesh's own."""

    def without_rounds(reports):
        less = lambda memory: {each: dataclasses.replace(at, rounds=None) for each, at in memory.items()}  # noqa: E731
        return {where: dataclasses.replace(report, memory=less(report.memory)) for where, report in reports.items()}

    out, other = plain(name), run(name, trained(name), mesh, storage=storage)
    found, wanted = without_rounds(other.reports), without_rounds(out.reports)
    assert_close((other.logits, found, other.reads), (out.logits, wanted, out.reads))
    rounds = [int(np.max(each.rounds)) for report in other.reports.values() for each in report.memory.values()]
    assert min(rounds) >= 1 and (max(rounds) == 1 or storage == "rows")
