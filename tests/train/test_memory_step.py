"""A training step of a model with lookup tables: against tables that are ordinary parameters, on meshes, however the
stack is run, and skipped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.blocks.dense import DenseSpec
from sparsejax.data.config import DataConfig
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.learned import Softmax
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.model.config import ModelConfig
from sparsejax.nn.table import summed_rows
from sparsejax.ops.losses import cross_entropies
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.optimizer import AdamW
from sparsejax.train.row_optimizer import RowSGD
from sparsejax.train.state import abstract_model, abstract_state, init_state, split_tables, with_tables
from sparsejax.train.step import make_grads_of_step, make_train_step

from support import ONE_DEVICE, assert_close, host_batch, on_mesh, put_batch, to_numpy

ROWS, LENGTH, VOCAB = 8, 12, 32
ARRAYS = host_batch(ROWS, LENGTH, VOCAB)
RATE = 0.5


def experiment(shape=ONE_DEVICE, storage="replicated", accumulation=1, clip_norm=None, **model) -> ExperimentConfig:
    """Tables of their own by id in a prefix and a repeated layer, and one by LSH that two kinds of layers share."""
    memory = {
        "ids": MemorySpec(blocks=("first", "dense"), place="before_attention", storage=storage),
        "lsh": MemorySpec(
            address=Hyperplanes(bits=3),
            blocks=("dense", "other"),
            place="parallel",
            shared=True,
            storage="rows" if storage == "host" else storage,  # its addresses are not known from the input
        ),
    }
    dense = DenseSpec(d_ff=16)
    model = {
        "d_model": 8,
        "num_heads": 2,
        "vocab_size": VOCAB,
        "prefix": ("first",),
        "pattern": ("dense", "other"),
        "repeats": 2,
        "blocks": {"first": dense, "dense": dense, "other": dense},
        "memory": memory,
    } | model
    return ExperimentConfig(
        model=ModelConfig(**model),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]),
        optimizer=AdamW(learning_rate=0.01, clip_norm=clip_norm, tables=RowSGD(learning_rate=RATE)),
        train=TrainConfig(accumulation=accumulation, steps=10),
    )


@functools.cache
def first_state(**model):
    """On the host, with tables that are not zero."""
    config = experiment(**model)
    with on_mesh(ONE_DEVICE):
        state = to_numpy(jax.jit(lambda: init_state(config, optax.sgd(0.1)))())
    dense, tables = split_tables(state.params)
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=table.shape).astype(np.float32) for name, table in tables.items()}
    return dataclasses.replace(state, params=with_tables(dense, drawn, state.params))


def placed(config, mesh, state):
    leaves, structure = jax.tree.flatten(state)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract_state(config, optax.sgd(0.1), mesh))]
    return structure.unflatten(map(jax.device_put, leaves, shardings))


@functools.cache
def gradients(shape=ONE_DEVICE, storage="replicated", accumulation=1, **model):
    """(loss, gradients of parameters, of rows)."""
    config = experiment(shape, storage, accumulation, **model)
    with on_mesh(shape) as mesh:
        state = placed(config, mesh, first_state())
        arrays = shard_batch(ARRAYS, mesh, accumulation)
        run = jax.jit(make_grads_of_step(config))
        (loss, _), found = to_numpy(run(state.params, state.model_state, arrays, state.step))
    return loss, found.dense, {name: summed_rows(read) for name, read in found.rows.items()}


@functools.cache
def by_hand():
    """The same where tables are parameters like others."""
    config = experiment()
    with on_mesh(ONE_DEVICE) as mesh:
        state, batch = placed(config, mesh, first_state()), put_batch(ARRAYS, mesh)
        graph, _, _ = abstract_model(config.model)
        dense, tables = split_tables(state.params)

        def loss_fn(dense, tables):
            model = nnx.merge(graph, with_tables(dense, tables, state.params), state.model_state)
            nll_BT = cross_entropies(model(batch, mode="train").logits, batch.targets, batch.loss_mask)
            return nll_BT.sum() / batch.loss_mask.sum()

        loss, (of_dense, of_tables) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(dense, tables)
        return to_numpy((loss, of_dense, of_tables))


def touched(table: np.ndarray) -> np.ndarray:
    """The rows that are not zero, in order of size, whatever places they have."""
    rows = table.reshape(-1, table.shape[-1])
    rows = rows[np.abs(rows).sum(-1) > 0]
    return rows[np.lexsort(rows.T)]


def test_gradients_are_those_of_tables_that_are_parameters():
    loss, dense, rows = gradients()
    expected_loss, expected_dense, expected_tables = by_hand()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_close(dense, expected_dense)
    for name, table in expected_tables.items():
        np.testing.assert_allclose(touched(rows[name]), touched(table), atol=1e-6)
        assert len(touched(table)) > 4


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"scan": False}, marks=pytest.mark.slow),
        {"remat": "full"},
        {"accumulation": 2},
        {"shape": (2, 2, 2), "storage": "rows"},
        {"shape": (4, 2, 1), "storage": "rows"},
        pytest.param({"shape": (4, 2, 1), "storage": "features"}, marks=pytest.mark.slow),
        pytest.param({"shape": (4, 2, 1), "storage": "replicated"}, marks=pytest.mark.slow),
        {"shape": (4, 2, 1), "storage": "host"},
        pytest.param({"storage": "host", "remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_whatever_the_stack_the_mesh_and_the_storage(setting):
    assert_close(gradients(**setting), gradients())


@functools.cache
def stepped(shape=ONE_DEVICE, storage="replicated", clip_norm=None, spoilt=False):
    config, tx = experiment(shape, storage, clip_norm=clip_norm), optax.sgd(0.1)
    with on_mesh(shape) as mesh:
        first = first_state()
        if spoilt:
            dense, tables = split_tables(first.params)
            dense = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), dense)
            first = dataclasses.replace(first, params=with_tables(dense, tables, first.params))
        state = placed(config, mesh, first)
        after, report = jax.jit(make_train_step(config, tx))(state, shard_batch(ARRAYS, mesh, 1))
        kind = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after.params["tables"]["ids"])}
        assert kind == {"pinned_host" if storage == "host" else "device"}
        return first, to_numpy((after, report))


@pytest.mark.parametrize("clip_norm", (None, 0.1))
def test_a_step_moves_tables_by_their_own_rate_and_all_by_one_norm(clip_norm):
    first, (state, report) = stepped(clip_norm=clip_norm)
    _, of_dense, of_tables = by_hand()
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves((of_dense, of_tables))))
    np.testing.assert_allclose(report.grad_norm, norm, rtol=1e-5)
    scale = 1 if clip_norm is None else clip_norm / norm
    (dense, tables), (old_dense, old_tables) = split_tables(state.params), split_tables(first.params)
    assert_close(dense, jax.tree.map(lambda old, g: old - 0.1 * scale * g, old_dense, of_dense))
    for name, old in old_tables.items():
        np.testing.assert_allclose(tables[name], old - RATE * scale * of_tables[name], atol=1e-6)
        assert int(report.tables[name].touched) == len(touched(of_tables[name]))


@pytest.mark.parametrize("storage", ("rows", "features", pytest.param("host", marks=pytest.mark.slow)))
def test_a_step_on_a_mesh_leaves_the_tables_of_one_device(storage):
    _, (state, report) = stepped((4, 2, 1), storage, 0.1)
    _, (alone, single) = stepped(clip_norm=0.1)
    assert_close(state.params, alone.params)
    assert {n: t.touched for n, t in report.tables.items()} == {n: t.touched for n, t in single.tables.items()}


def test_a_step_that_is_not_finite_changes_no_table():
    first, (state, report) = stepped(spoilt=True)
    assert not report.finite
    for name, table in split_tables(state.params)[1].items():
        assert np.array_equal(table, split_tables(first.params)[1][name])


def balanced(balance, shape=ONE_DEVICE, accumulation=1):
    """(loss, gradient of the scores) of a model that looks up in one learned softmax."""
    spec = MemorySpec(address=Softmax(entries=6, balance=balance), blocks=("dense",))
    config = experiment(shape, accumulation=accumulation, prefix=(), pattern=("dense",), memory={"learned": spec})
    with on_mesh(shape) as mesh:
        state = jax.jit(lambda: init_state(config, optax.sgd(0.1)))()
        arrays = shard_batch(ARRAYS, mesh, accumulation)
        (loss, _), found = jax.jit(make_grads_of_step(config))(state.params, state.model_state, arrays, state.step)
        return to_numpy(
            (loss, next(leaf for path, leaf in nnx.to_flat_state(found.dense) if path[-1] == "scores")[...])
        )


def test_the_balance_of_a_learned_softmax_is_a_loss_of_its_scores():
    """At least its coefficient in each of two layers; to the scores it is all, for the table is zero at first."""
    (without, nothing), (loss, gradient) = balanced(0.0), balanced(0.3)
    assert loss - without >= 0.3 * 2 - 1e-5
    assert not nothing.any() and gradient.any()
    assert_close(balanced(0.3, (2, 2, 2)), (loss, gradient))
    halves, _ = balanced(0.3, accumulation=2)  # each microbatch is balanced for itself, so the loss is another
    assert loss != halves and abs(halves - loss) < 0.1


def test_a_zero_table_is_no_memory():
    """And gradients of all other parameters are those of the model without it."""
    with_memory, without = experiment(), experiment(memory={})
    with on_mesh(ONE_DEVICE) as mesh:
        batch = put_batch(ARRAYS, mesh)
        logits = []
        for config in (with_memory, without):
            state = jax.jit(lambda config=config: init_state(config, optax.sgd(0.1)))()
            graph, _, _ = abstract_model(config.model)
            logits.append(nnx.merge(graph, state.params, state.model_state)(batch, mode="eval").logits)
    assert np.array_equal(*logits)


def test_running_means_move_once_a_step_and_not_in_evaluation():
    first, (state, _) = stepped()
    before, after = (dict(nnx.to_flat_state(s.model_state)) for s in (first, state))
    moved = {path[-1] for path in before if not np.array_equal(before[path][...], after[path][...])}
    assert moved == {"running"}
    assert jnp.isfinite(after[next(path for path in after if path[-1] == "running")][...]).all()
