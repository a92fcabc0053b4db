"""Encoders are trained and evaluated: hidden tokens and classes, on any mesh, in parts, resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.config import load
from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import MeshConfig, make_mesh, shard_batch
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import train_rows
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_corpus
from sparsejax.train.state import init_state, make_optimizer
from sparsejax.train.step import make_eval_step, make_grads_of_step

from runs import CONFIG, here
from support import assert_close, to_numpy

TINY = {
    "data.name": "synthetic",
    "data.sequence_length": "16",
    "data.batch_size": "8",
    "model.d_model": "16",
    "model.num_heads": "2",
    "model.vocab_size": "260",
    "model.pattern": "(dense, moe)",
    "model.repeats": "1",
    "model.blocks.moe.num_experts": "4",
    "model.blocks.moe.router.balance": "none",
    "model.causal": "false",
}
MASKED = {"data.task": "masked"}
CLASSES = {"data.task": "classify", "data.task.classes": "3", "model.head": "classes", "model.head.classes": "3"}
TASKS = {"masked": MASKED, "mean": CLASSES, "first": CLASSES | {"model.head.pool": "first"}}


def experiment(**more):
    return load(ExperimentConfig, None, list((TINY | more).items())).config


def on(config, shape, accumulation):
    """(loss, nll, correct, gradients) of the first step, and the sums of its batch as an evaluation."""
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]),
        train=dataclasses.replace(config.train, accumulation=accumulation),
    )
    mesh = make_mesh(config.mesh)
    batch = train_rows(open_corpus(config.data), config.data, 0).rows(np.arange(8))
    batch["rows"] = np.arange(8, dtype=np.int32)
    with jax.set_mesh(mesh):
        state = init_state(config, make_optimizer(config))
        arrays = shard_batch(batch, mesh, accumulation)
        (loss, (nll, correct, *_)), grads = jax.jit(make_grads_of_step(config))(
            state.params, state.model_state, arrays, jnp.int32(0)
        )
        told = jax.jit(make_eval_step(config))(state.variables, shard_batch(batch, mesh, 1))
        return to_numpy((loss, nll, correct, grads.dense, told.cross_entropy_sum, told.correct, told.targets))


@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_the_same_on_any_mesh_and_in_parts(task):
    config = experiment(**TASKS[task])
    expected = on(config, (1, 1, 1), 1)
    assert_close(on(config, (2, 2, 2), 2), expected, 2e-5)
    assert expected[-1] == (8 if task != "masked" else expected[-1]) and 0 <= expected[2] <= expected[-1]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[3]))


@pytest.mark.parametrize("task", ["masked", "mean"])
def test_it_learns_resumes_and_is_evaluated(task, tmp_path):
    more = {"optimizer.learning_rate": 0.01, "train.log_every": 20, "train.tensorboard": False, "eval.every": 20}
    given = TINY | TASKS[task] | more | {"checkpoint.every": 20}
    words = [f"--config.{key}={value}" for key, value in given.items()] + [f"--workdir={tmp_path / 'run'}"]
    assert here("train", CONFIG, "--config.train.steps=40", *words).status == 0
    resumed = here("train", CONFIG, "--config.train.steps=60", "--allow-config-change", *words)
    assert resumed.status == 0 and "resumed from checkpoint 40" in resumed.out
    assert "% right" in resumed.out and "sparsejax generate" not in resumed.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained, evaluated = ([row for row in rows if row["split"] == split] for split in ("train", "eval"))
    assert trained[-1]["cross_entropy"] < trained[0]["cross_entropy"] and "bits_per_byte" not in trained[-1]
    assert evaluated[-1]["accuracy"] > (0.5 if task == "mean" else 0.1)
    once = here("eval", f"--workdir={tmp_path / 'run'}")
    assert once.status == 0
    again = json.loads(once.out.splitlines()[-1])
    assert again["accuracy"] == evaluated[-1]["accuracy"] and again["targets"] == evaluated[-1]["targets"]
    refused = here("generate", f"--workdir={tmp_path / 'run'}")
    assert refused.status == 2 and "generation" in refused.err


class TestRefused:
    @pytest.mark.parametrize(
        "settings, key, message",
        [
            ({"data.task": "next_token"}, "model.causal", "a token would see its own target.*masked or classify"),
            (MASKED | {"model.causal": "true"}, "data.task", "masked.*next_token or classify"),
            ({"data.task": "classify"}, "model.head", "tokens with data.task=classify"),
            (MASKED | {"model.head": "classes"}, "model.head", "classes with data.task=masked"),
            (CLASSES | {"model.head.classes": "4"}, "model.head.classes", "4 is not data.task.classes=3"),
            (TASKS["first"] | {"model.causal": "true"}, "model.head.pool", "allowed: mean"),
            (CLASSES | {"model.tied_head": "true"}, "model.tied_head", "has no effect"),
        ],
    )
    def test_what_does_not_go_together(self, settings, key, message):
        if key == "model.tied_head":
            settings = settings | {"model.tied_head": "false"}
        with pytest.raises(ConfigError, match=message) as error:
            experiment(**settings)
        assert error.value.key == key

    @pytest.mark.parametrize("task, needed", [(MASKED, 257), (CLASSES, 258)])
    def test_a_vocabulary_without_room_for_their_own_ids(self, task, needed):
        config = experiment(**task, **{"model.vocab_size": str(needed - 1)})
        with pytest.raises(ConfigError, match=f"allowed: {needed} or more") as error:
            check_corpus(config, open_corpus(config.data))
        assert error.value.key == "model.vocab_size"
        config = experiment(**task, **{"model.vocab_size": str(needed)})
        check_corpus(config, open_corpus(config.data))
