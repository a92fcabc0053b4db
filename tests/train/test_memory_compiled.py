"""The compiled training step of a model with large lookup tables: what it moves between devices, how much it keeps
beside the tables, and where it reads them."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from sparsejax.base.sharding import MeshConfig
from sparsejax.blocks.dense import DenseSpec
from sparsejax.data.config import DataConfig
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import Project
from sparsejax.memory.contents import Vector
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.memory.token_ids import TokenId
from sparsejax.model.config import ModelConfig
from sparsejax.plan.abstract import abstract_batch
from sparsejax.plan.collectives import read_collectives
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.optimizer import AdamW
from sparsejax.train.row_optimizer import RowAdam
from sparsejax.train.state import abstract_state, make_optimizer, split_tables
from sparsejax.train.step import make_grads_of_step, make_train_step

from support import on_mesh

SHAPE = (4, 2, 1)
DEVICES, ROWS, LENGTH, WIDTH, BITS = 8, 16, 12, 256, 17
TABLE_BYTES = 2 * 2**BITS * WIDTH * 4  # those of both layers


def experiment(storage: str, **model: Any) -> ExperimentConfig:
    """A table by hashed id for each of two layers, and one by LSH that both share."""
    narrow = {"content": Vector(size=WIDTH), "consume": Project(), "blocks": ("dense",), "storage": storage}
    memory = {"early": MemorySpec(address=TokenId(buckets=2**BITS), **narrow)}
    if storage != "host":
        memory["late"] = MemorySpec(address=Hyperplanes(bits=BITS), shared=True, **narrow)
    shape = {"d_model": 16, "num_heads": 2, "vocab_size": 32, "pattern": ("dense",), "repeats": 2}
    return ExperimentConfig(
        model=ModelConfig(**(shape | {"blocks": {"dense": DenseSpec(d_ff=16)}, "memory": memory} | model)),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=SHAPE[0], expert=SHAPE[1], tensor=SHAPE[2]),
        optimizer=AdamW(learning_rate=0.01, clip_norm=0.1, tables=RowAdam()),
        train=TrainConfig(accumulation=2, steps=10),
    )


@functools.cache
def compiled(storage: str):
    """The whole step: two microbatches, one norm for all, clipping, the skip, both optimizers."""
    config = experiment(storage)
    with on_mesh(SHAPE) as mesh:
        tx = make_optimizer(config)
        state, batch = abstract_state(config, tx, mesh), abstract_batch(config, mesh)
        return jax.jit(make_train_step(config, tx), donate_argnums=0).lower(state, batch).compile()


LOOKUP, UPDATE = re.compile("memory/(early/pre|late/)fetch"), re.compile("tables/")


def moved(storage: str, where: re.Pattern[str]) -> dict[str, int]:
    """Kind of collective → most bytes of one, in one part of the step."""
    found: dict[str, int] = {}
    for each in read_collectives(compiled(storage).as_text(), SHAPE):
        if where.search(each.scope):
            found[each.kind] = max(found.get(each.kind, 0), each.once)
    return found


IDS, NUMBERS = ROWS * LENGTH * 4, DEVICES * 16  # bytes of the ids of a step, and of a few numbers for each device
ALLOWED = {
    "rows": ({"all-to-all": TABLE_BYTES, "all-reduce": NUMBERS}, {"all-to-all": TABLE_BYTES, "all-reduce": NUMBERS}),
    "features": (
        {"all-gather": IDS, "all-to-all": TABLE_BYTES},
        {"all-gather": 2 * IDS, "all-to-all": TABLE_BYTES, "all-reduce": 2 * IDS},
    ),
    "host": ({"all-to-all": TABLE_BYTES, "all-reduce": NUMBERS}, {"all-to-all": TABLE_BYTES, "all-reduce": NUMBERS}),
    "replicated": ({}, {"all-gather": TABLE_BYTES}),
}
"""Storage → kinds of collectives of the lookup and of the update, and the bytes that one may have beside the bound that
all have."""
STORAGES = ["rows", *(pytest.param(each, marks=pytest.mark.slow) for each in ALLOWED if each != "rows")]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_travels_is_what_was_read_and_never_a_table(storage):
    rows = 2 * ROWS * LENGTH * WIDTH * 4  # of both layers, of all devices
    for part, allowed in zip((LOOKUP, UPDATE), ALLOWED[storage], strict=True):
        sent = moved(storage, part)
        assert sent.keys() == allowed.keys()
        assert all(sent[kind] <= min(allowed[kind], 2 * rows) for kind in sent), sent
    assert max(moved(storage, re.compile("")).values()) < TABLE_BYTES / 100


@pytest.mark.parametrize("storage", STORAGES)
def test_beside_the_tables_and_their_moments_nothing_is_as_large(storage):
    """Neither in the gradient, its norm, clipping, accumulation nor in the optimizers; and all change in place."""
    config, memory = experiment(storage), compiled(storage).memory_analysis()
    of_device = TABLE_BYTES // (1 if storage == "replicated" else DEVICES)
    tables = len(config.model.memory) - 0.5 * ("late" in config.model.memory)  # two layers share one
    assert memory.temp_size_in_bytes < of_device / 8
    assert memory.alias_size_in_bytes > 3 * tables * of_device
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < of_device / 8


def _inputs_of_loops(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of what goes into loops and into what is computed again in the backward pass."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while", "checkpoint", "remat2"):
            yield from (var.aval.shape for var in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from _inputs_of_loops(inner)


@pytest.mark.parametrize("storage", ["replicated", "rows", "features", "host"])
def test_rows_that_the_input_tells_are_read_before_the_first_layer(storage):
    """Their table goes into no loop over layers, as that of the other memory does; and no layer reads it again for the
    backward pass."""
    config = experiment(storage, remat="full")
    config = dataclasses.replace(config, train=TrainConfig(steps=10))  # microbatches are a loop, too
    with on_mesh(SHAPE) as mesh:
        state, batch = abstract_state(config, make_optimizer(config), mesh), abstract_batch(config, mesh)
        grads = jax.make_jaxpr(make_grads_of_step(config))(state.params, state.model_state, batch, state.step)
    tables = {name: table.shape for name, table in split_tables(state.params)[1].items()}
    seen = set(_inputs_of_loops(grads.jaxpr))
    assert tables["early"] not in seen
    assert storage == "host" or tables["late"] in seen
