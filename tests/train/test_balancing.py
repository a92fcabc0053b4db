"""A balance controller in a whole run: its state moves once a step, is saved, and evaluation leaves it alone."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.config import from_json
from sparsejax.train import loop
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables

from runs import STEPS, arguments, here, losses, rows, stop_at
from support import ONE_DEVICE, on_mesh

ROUTER = "model__blocks__moe__router__"
SETTINGS = {ROUTER + "controller": "loss_free", ROUTER + "controller.rate": 0.01, ROUTER + "balance": "none"}


def words(workdir):
    return arguments("train", f"--workdir={workdir}", **SETTINGS)


def biases(workdir, step=None):
    """The state of every layer after a step: `[R, E]`."""
    config = from_json(ExperimentConfig, (workdir / "config.json").read_text()).config
    with on_mesh(ONE_DEVICE) as mesh:
        variables, _, _ = restore_variables(config, workdir, mesh, step)
    (state,) = jax.tree.leaves(nnx.to_pure_dict(variables.model_state))
    return np.asarray(state)[:, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("balancing") / "run"
    done = here(*words(workdir))
    assert done.status == 0, done.err
    return workdir


def test_the_state_moves_at_most_once_a_step(run):
    third, last = biases(run, 3), biases(run)
    assert np.abs(third).max() > 0 and not np.array_equal(third, last)
    # A step adds ±rate (or 0) and takes the mean out, which is at most the rate as well.
    assert np.abs(third).max() <= 2 * 3 * 0.01 and np.abs(last - third).max() <= 2 * (STEPS - 3) * 0.01
    np.testing.assert_allclose(last.mean(-1), 0, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Display, "update", stop_at(5))
        assert "stopped by SIGTERM" in here(*words(workdir)).out
    assert here(*words(workdir)).status == 0
    assert losses(workdir)[STEPS] == losses(run)[STEPS]
    assert np.array_equal(biases(workdir), biases(run))


def test_evaluation_reads_it_and_changes_nothing(run):
    before = biases(run)
    row = here("eval", f"--workdir={run}").json
    assert row["loss"] == rows(run, "eval")[STEPS]["loss"]
    assert np.array_equal(biases(run), before)
