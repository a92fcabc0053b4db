"""Exits of a classifier: each says what the model cut off there would say, however the step is run."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import MeshConfig, shard_batch
from sparsejax.blocks.altup import AltUp
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.skim_methods import Schedule
from sparsejax.data.config import DataConfig
from sparsejax.data.tasks import Classify
from sparsejax.model.config import ModelConfig
from sparsejax.model.exits import ExitHeads, NoExits
from sparsejax.model.heads import Classes
from sparsejax.model.unrolled import unrolled, unrolled_variables
from sparsejax.train.config import ExperimentConfig, TrainConfig
from sparsejax.train.metrics import eval_row
from sparsejax.train.state import Variables, make_optimizer, new_state
from sparsejax.train.step import make_eval_step, make_grads_of_step

from support import assert_close, host_batch, on_mesh, to_numpy

ROWS, LENGTH, CLASSES = 8, 6, 3
MODEL = ModelConfig(
    d_model=8,
    num_heads=2,
    vocab_size=32,
    causal=False,
    prefix=("dense",),
    pattern=("dense", "moe"),
    repeats=2,
    blocks={"dense": DenseSpec(d_ff=16), "moe": MoESpec(num_experts=4, d_ff=8, capacity_factor=4.0)},
    head=Classes(classes=CLASSES),
    exits=ExitHeads(layers=(1, 2, 4), head="own", distill=0.3, equilibrium=True),
)


def arrays() -> dict[str, np.ndarray]:
    """Rows of one document of various lengths, the last without any; targets at position 0."""
    batch = host_batch(ROWS, LENGTH, documents=1, padded=0)
    lengths = np.array([6, 3, 1, 6, 5, 2, 4, 0])[:, None]
    real, first = np.arange(LENGTH) < lengths, np.arange(LENGTH) == 0
    target = np.random.default_rng(1).integers(0, CLASSES, (ROWS, 1))
    return batch | {
        "tokens": np.where(real, batch["tokens"], 0),
        "segments": real.astype(np.int32),
        "positions": np.where(real, batch["positions"], 0),
        "targets": np.where(real & first, target, 0).astype(np.int32),
        "loss_mask": real & first,
    }


ARRAYS = arrays()


def experiment(shape=(1, 1, 1), accumulation=1, **model) -> ExperimentConfig:
    data, expert, tensor = shape
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH, task=Classify(classes=CLASSES)),
        mesh=MeshConfig(data=data, expert=expert, tensor=tensor),
        train=TrainConfig(steps=4, accumulation=accumulation),
    )


def gradients(config: ExperimentConfig):
    """((loss, nll, correct, exits), gradients) of the first step."""
    with on_mesh(config.mesh.shape) as mesh:
        state = new_state(config, make_optimizer(config))
        batch = shard_batch(ARRAYS, mesh, config.train.accumulation)
        (loss, found), grads = jax.jit(make_grads_of_step(config))(state.params, state.model_state, batch, state.step)
        nll, correct, _, _, exits = found
        return to_numpy(((loss, nll, correct, exits), grads.dense))


def test_a_step_is_the_same_on_a_mesh_in_parts_and_unrolled():
    want = gradients(experiment())
    assert_close(gradients(experiment((2, 2, 2), accumulation=1)), want, 2e-5, atol=1e-7)
    assert_close(gradients(experiment(accumulation=2, remat="full")), want, 2e-5, atol=1e-7)
    of_exits = {path[0] for path, leaf in nnx.to_flat_state(want[1]) if np.abs(leaf[...]).max() > 0}
    assert "exits" in of_exits


def evaluated(config: ExperimentConfig, variables=None, batch=ARRAYS):
    """The sums of the batch as an evaluation, and the variables."""
    with on_mesh(config.mesh.shape) as mesh:
        if variables is None:  # norms are not to be alike
            rng, first = np.random.default_rng(0), new_state(config, make_optimizer(config)).variables
            moved = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), first.params)
            variables = dataclasses.replace(first, params=moved)
        return to_numpy((jax.jit(make_eval_step(config))(variables, shard_batch(batch, mesh, 1)), variables))


def cut_off(config: ModelConfig, variables: Variables, depth: int) -> tuple[ModelConfig, Variables]:
    """The model of the first layers alone, with norm and head of the exit that stands there."""
    flat = unrolled(config)
    whole = dict(nnx.to_flat_state(unrolled_variables(config, variables.params)))
    number = config.exits.depths.index(depth)
    whole |= {("final_norm", "scale"): whole["exits", "norms", number, "scale"]}
    whole |= {("head", "weight"): whole["exits", "heads", number, "weight"]}
    left = {p: v for p, v in whole.items() if p[0] != "exits" and (p[:2] != ("stack", "prefix") or p[2] < depth)}
    model = dataclasses.replace(flat, prefix=flat.prefix[:depth], exits=NoExits())
    return model, Variables(params=nnx.from_flat_state(left), model_state=variables.model_state)


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("streams", ["one", "altup"])
def test_an_exit_says_what_the_model_cut_off_there_would(pool, streams):
    kind = {} if streams == "one" else {"streams": AltUp(streams=2)}
    config = experiment(pattern=("dense", "dense"), head=Classes(classes=CLASSES, pool=pool), **kind)
    report, variables = evaluated(config)
    assert report.targets == ROWS - 1
    for number, depth in enumerate(config.model.exits.depths):
        model, of_it = cut_off(config.model, variables, depth)
        alone = evaluated(dataclasses.replace(config, model=model), of_it)[0]
        np.testing.assert_allclose(report.exits.cross_entropy[number], alone.cross_entropy_sum, rtol=1e-5)
        assert report.exits.correct[number] == alone.correct
    other = ARRAYS | {"tokens": np.where(ARRAYS["segments"] > 0, ARRAYS["tokens"], 7)}
    assert_close(evaluated(config, variables, other)[0].exits, report.exits, 1e-6)  # no exit pools padding
    row = eval_row(config.model, report)[0]
    assert row["exit/02/accuracy"] == report.exits.correct[1] / (ROWS - 1)
    assert row["exit/02/cross_entropy"] == pytest.approx(report.exits.cross_entropy[1] / (ROWS - 1))


def test_tokens_that_leave_have_no_exits():
    with pytest.raises(ConfigError, match="skim=schedule takes some away"):
        dataclasses.replace(MODEL, pattern=("dense", "dense"), skim=Schedule(shares=(0.5,) * 5))
