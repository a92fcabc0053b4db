"""Steps that train exits: with no weight the plain step, the same on every mesh and however compiled, nothing of the
backbone in a second stage, and layers that rows skip."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.base.structs import Batch
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.model.exits import ExitHeads, Exits, NoExits, TwoStage
from sparsejax.model.lm import LanguageModel
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.state import make_optimizer, new_state
from sparsejax.train.step import make_eval_step, make_grads_of_step, make_train_step

from reference import exit_training as reference
from support import assert_close, host_batch, on_mesh, put_batch, to_numpy

ROWS, LENGTH = 8, 6
ARRAYS = host_batch(ROWS, LENGTH)
MODEL = ModelConfig(
    d_model=8,
    num_heads=2,
    vocab_size=32,
    prefix=("dense",),
    pattern=("dense", "moe"),
    repeats=2,
    blocks={"dense": DenseSpec(d_ff=16), "moe": MoESpec(num_experts=4, d_ff=8, capacity_factor=4.0)},
)
FULL = ExitHeads(layers=(1, 2, 4), head="own", distill=0.3, equilibrium=True, weights="sum_l")


def experiment(exits: Exits, shape=(1, 1, 1), accumulation=1, steps=4, **model) -> ExperimentConfig:
    data, expert, tensor = shape
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, exits=exits, **model),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
        mesh=MeshConfig(data=data, expert=expert, tensor=tensor),
        train=TrainConfig(steps=steps, accumulation=accumulation),
    )


def run(config: ExperimentConfig):
    """(loss, (nll, correct, terms, reports, exits), gradients by path) of the first step."""
    with on_mesh(config.mesh.shape) as mesh:
        state = new_state(config, make_optimizer(config))
        batch = shard_batch(ARRAYS, mesh, config.train.accumulation)
        (loss, found), grads = jax.jit(make_grads_of_step(config))(state.params, state.model_state, batch, state.step)
        return to_numpy((loss, found, by_path(grads.dense)))


def by_path(state: nnx.State) -> dict:
    return {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


@functools.cache
def plain():
    return run(experiment(NoExits()))


def test_without_weight_they_change_nothing():
    loss, (nll, _, terms, _, exits), grads = run(experiment(ExitHeads(layers=(1, 2, 4), scale=0.0)))
    want = plain()
    np.testing.assert_allclose((loss, nll), (want[0], want[1][0]), rtol=1e-6)
    assert abs(terms["exits"]) < 1e-6 and exits.correct.shape == (3,)
    assert (exits.cross_entropy > ARRAYS["loss_mask"].sum()).all() and exits.correct.dtype == np.int32
    own = {path: grads.pop(path) for path in list(grads) if path.startswith("exits")}
    assert own and not any(each.any() for each in own.values())
    assert_close(grads, want[2], atol=1e-8)


@functools.cache
def full():
    return run(experiment(FULL, layer_dropout=0.5))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"scan": False}, id="unrolled", marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, id="recomputed", marks=pytest.mark.slow),
        pytest.param({"accumulation": 2}, id="accumulated"),
        pytest.param({"shape": (2, 1, 2)}, id="mesh"),
    ],
)
def test_the_same_however_it_is_run(other):
    assert_close(run(experiment(FULL, layer_dropout=0.5, **other))[::2], full()[::2], atol=1e-7)


def test_what_is_logged_adds_up():
    loss, (nll, _, terms, _, exits), _ = full()
    assert set(terms) >= {"exits", "distillation"}
    np.testing.assert_allclose(loss, nll + sum(terms.values()), rtol=1e-6)
    # Another way to the term: from the cross entropies and the weights of the paper.
    weights = reference.weights("sum_l", FULL.layers, MODEL.num_layers)
    hard = np.append(weights[:-1] * (1 - FULL.distill), weights[-1])
    means = exits.cross_entropy / ARRAYS["loss_mask"].sum()
    np.testing.assert_allclose(terms["exits"], hard @ np.append(means, nll) - nll, rtol=1e-4)


def test_equilibrium_gives_the_first_layer_the_mean_of_the_gradients():
    exits = ExitHeads(layers=(1, 2, 4))
    # Without experts: their balance losses come from between the exits.
    both = (dataclasses.replace(exits, equilibrium=on) for on in (False, True))
    before, after = (run(experiment(each, pattern=("dense", "dense")))[2] for each in both)
    first = {path: grad for path, grad in after.items() if path.startswith("stack/prefix/0")}
    assert first
    assert_close(first, {path: before[path] / 4 for path in first}, atol=1e-9)


def test_a_second_stage_moves_the_exits_alone():
    config = experiment(ExitHeads(layers=(1, 2), head="own", curriculum=TwoStage(start=0.5)), steps=2)
    with on_mesh(config.mesh.shape) as mesh:
        tx = make_optimizer(config)
        step = jax.jit(make_train_step(config, tx))
        states, batch = [new_state(config, tx)], shard_batch(ARRAYS, mesh, 1)
        for _ in range(2):
            states.append(step(states[-1], batch)[0])
        start, first, second = (to_numpy(({**by_path(s.params)}, s.model_state)) for s in states)
    moved = {path for path, value in first[0].items() if (value != start[0][path]).any()}
    assert {"embedding/table", "final_norm/scale"} <= moved
    moved = {path for path, value in second[0].items() if (value != first[0][path]).any()}
    assert moved and all(path.startswith("exits") for path in moved)
    assert len(moved) == 4
    assert_close(second[1], first[1], tolerance=0)


def test_evaluation_tells_the_loss_of_every_exit():
    config = experiment(FULL)
    with on_mesh(config.mesh.shape) as mesh:
        state = new_state(config, make_optimizer(config))
        report = to_numpy(jax.jit(make_eval_step(config))(state.variables, shard_batch(ARRAYS, mesh, 1)))
    plain_config = experiment(NoExits())
    with on_mesh(plain_config.mesh.shape) as mesh:
        state = new_state(plain_config, make_optimizer(plain_config))
        want = to_numpy(jax.jit(make_eval_step(plain_config))(state.variables, shard_batch(ARRAYS, mesh, 1)))
    assert report.exits.cross_entropy.shape == (3,) and np.isfinite(report.exits.cross_entropy).all()
    np.testing.assert_allclose(report.cross_entropy_sum, want.cross_entropy_sum, rtol=1e-6)


def test_rows_skip_layers_as_often_as_they_should():
    rows, rate = 512, 0.4
    config = dataclasses.replace(
        MODEL, pattern=("dense",), layer_dropout=rate, exits=ExitHeads(layers=(1, 2), norm="shared")
    )

    @jax.jit
    def skipped(batch: Batch):
        out = LanguageModel(jax.random.key(1), config)(batch, mode="train", key=jax.random.key(2))
        states = (*out.exits, out.features)
        return [(a == b).all((1, 2)) for a, b in itertools.pairwise(states)]

    with on_mesh((1, 1, 1)) as mesh:
        found = to_numpy(skipped(put_batch(host_batch(rows, 4, documents=1, padded=0), mesh)))
    for each, p in zip(found, reference.layer_dropout(rate, 3)[1:], strict=True):
        assert abs(each.mean() - p) < 4 * (p * (1 - p) / rows) ** 0.5
    assert (found[0] & ~found[1]).any() and (found[1] & ~found[0]).any()
