"""The `eval` command: the numbers of the last row again, on any mesh; and whether meshes agree."""

import json

import jax
import pytest

from sparsejax.train import parity

from runs import SAVE_EVERY, STEPS, arguments, contents, here, rows

OF_THE_RUN = {"learning_rate", "nonfinite_steps", "seconds"}
"""Keys of a row that say how the run went, not how good the checkpoint is."""


def test_evaluating_gives_the_final_row_and_changes_nothing(finished_run):
    before = contents(finished_run)
    once, twice = (here("eval", f"--workdir={finished_run}").json for _ in range(2))
    row = rows(finished_run, "eval")[STEPS]
    assert once == {key: value for key, value in row.items() if key not in OF_THE_RUN}
    assert once == twice
    assert contents(finished_run) == before


def test_another_mesh_gives_the_same(finished_run):
    """Counts and what follows from them exactly, sums of floats but for the order in which they are taken."""
    one, eight = (
        here("eval", f"--workdir={finished_run}").json,
        here("eval", f"--workdir={finished_run}", "--mesh=2,2,2").json,
    )
    assert one.keys() == eight.keys()
    counted = {key for key in one if key.removeprefix("moe/") not in INEXACT and not key.startswith("loss")}
    assert {"targets", "tokens", "moe/drop_fraction", "moe/load_cv", "moe/unserved_fraction"} <= counted
    for key, value in one.items():
        if key in counted:
            assert eight[key] == value, key
        else:
            assert eight[key] == pytest.approx(value, rel=1e-5), key


INEXACT = {"cross_entropy", "bits_per_byte", "router_entropy", "router_z", "balance_loss"}


def test_an_older_checkpoint_can_be_chosen(finished_run):
    older = here("eval", f"--workdir={finished_run}", f"--step={SAVE_EVERY}").json
    assert older["step"] == SAVE_EVERY
    assert older["loss"] != rows(finished_run, "eval")[STEPS]["loss"]
    assert older["tokens"] < rows(finished_run, "eval")[STEPS]["tokens"]


def test_more_batches_can_be_asked_for(finished_run):
    few = here("eval", f"--workdir={finished_run}", "--config.eval.batches=1").json
    whole = here("eval", f"--workdir={finished_run}", "--config.eval.batches=None").json
    assert few["targets"] < rows(finished_run, "eval")[STEPS]["targets"] < whole["targets"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step=5"], f"no checkpoint of step 5 in {{run}}/checkpoints; there are: 3; 6; 9; {STEPS}"),
        (["--config.model.d_model=32"], f"checkpoint {STEPS} is of another model"),
        (["--config.train.stepz=3"], "config.train.stepz: no such key. Did you mean 'config.train.steps'?"),
        (["--mesh=3,1,1"], "config.data.batch_size: 8 rows do not split evenly"),
        (["--mesh=-1,3,1"], "config.data.batch_size: 8 rows do not split evenly"),
        (["--parity"], "eval --parity needs at least one --mesh=D,E,T"),
        (["--parity", "--mesh=2,4,1", "--mesh=1,3,1"], "config.data.batch_size: 8 rows do not split evenly"),
    ],
)
def test_wrong_requests(finished_run, words, message):
    assert message.format(run=finished_run) in here("eval", f"--workdir={finished_run}", *words).error


def test_a_run_without_a_checkpoint(finished_run, tmp_path):
    (tmp_path / "config.json").write_text((finished_run / "config.json").read_text())
    assert f"no checkpoint in {tmp_path / 'checkpoints'}" in here("eval", f"--workdir={tmp_path}").error


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(run_copy):
    next(path for path in (run_copy / "checkpoints" / str(STEPS) / "state").rglob("*") if path.is_file()).unlink()
    first = here("eval", f"--workdir={run_copy}")
    assert first.json["step"] == 9
    assert f"checkpoint {STEPS} is damaged and not used" in first.err
    done = here("eval", f"--workdir={run_copy}", f"--step={STEPS}")
    assert done.status == 1
    assert done.err.startswith(f"failed: checkpoint {STEPS} in {run_copy / 'checkpoints'} is damaged: ")


PARITY = ("--parity", "--mesh=2,4,1", "--mesh=2,2,2")


def test_meshes_agree():
    result = here(*arguments("eval", *PARITY)).json
    assert result["equal"] is True
    assert list(result["meshes"]) == ["2,4,1", "2,2,2"]
    for row in result["meshes"].values():
        assert row["equal"] is True
        assert row["unequal_counts"] == []
        assert row["loss"] == pytest.approx(result["reference_loss"], rel=1e-5)
        assert 0 < row["max_gradient_difference"] <= 1e-5


def test_meshes_agree_where_rows_are_exchanged():
    """Dropless, and with room for all: what one device does not drop, several do not."""
    words = arguments("eval", *PARITY, model__blocks__moe__dispatch="grouped", model__blocks__moe__buffer_factor="8.0")
    result = here(*words).json
    assert result["equal"] is True, result


@pytest.fixture(scope="module")
def first_steps():
    """What the first step gives on each mesh, once it has been asked for."""
    return {}


@pytest.fixture
def break_a_mesh(monkeypatch, first_steps):
    """`break_a_mesh(change)`: from now on the step on 2 × 2 × 2 gives `change(loss, gradients, ledger)`."""
    first_step = parity._first_step

    def install(change):
        def broken(config, batch):
            shape = config.mesh.shape
            if shape not in first_steps:
                first_steps[shape] = first_step(config, batch)
            found = first_steps[shape]
            if shape == (2, 2, 2):
                found = dict(zip(found, change(*found.values()), strict=True))
            return found

        monkeypatch.setattr(parity, "_first_step", broken)

    return install


def scaled(gradients, name, factor):
    return gradients | {name: gradients[name] * factor}


@pytest.mark.parametrize(
    ("change", "worst", "counts"),
    [
        (lambda loss, grads, ledger: (loss * 1.001, grads, ledger), None, []),
        (lambda loss, grads, ledger: (loss, scaled(grads, "final_norm.scale", 1.001), ledger), "final_norm.scale", []),
        (
            lambda loss, grads, ledger: (loss, scaled(grads, "embedding.table", float("nan")), ledger),
            "embedding.table",
            [],
        ),
        (
            lambda loss, grads, ledger: (loss, grads, ledger | {"01_moe/processed": ledger["01_moe/processed"] + 1}),
            None,
            ["01_moe/processed"],
        ),
    ],
    ids=["loss", "gradient", "nan", "counts"],
)
def test_meshes_that_do_not_agree_are_found_out(break_a_mesh, change, worst, counts):
    break_a_mesh(change)
    done = here(*arguments("eval", *PARITY))
    assert done.status == 1
    result = json.loads(done.out.splitlines()[-1])
    assert result["equal"] is False
    assert result["meshes"]["2,4,1"]["equal"] is True
    row = result["meshes"]["2,2,2"]
    assert row["equal"] is False
    assert row["unequal_counts"] == counts
    if worst is not None:
        assert row["worst_gradient"] == worst


def test_eight_devices_are_here():
    """Else the tests above compare a mesh with itself."""
    assert jax.device_count() == 8
