"""What a user does first, as processes of their own: train, look at the folder, evaluate, run it again."""

import json
import os
import shutil

import numpy as np
import pytest

from runs import CONFIG, STEPS, arguments, here, losses, process, rows

CHANGES = {"train__tensorboard": True, "checkpoint__keep": 1, "checkpoint__keep_every": 6}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(the folder the command ran in, what it printed) of a run without --workdir."""
    folder = tmp_path_factory.mktemp("user")
    done = process(*arguments("train", **CHANGES), cwd=folder)
    assert done.status == 0, done.err
    assert done.err == ""
    return folder, done.out


@pytest.fixture(scope="module")
def workdir(first):
    return first[0] / "runs" / "tiny"


def test_what_train_leaves_behind(first, workdir):
    """Besides the lock's own files. Of the checkpoints on 3, 6, 9, 12 the newest stays, and every sixth step's."""
    assert os.listdir(first[0]) == ["runs"]
    assert os.listdir(first[0] / "runs") == ["tiny"]
    assert {name for name in os.listdir(workdir) if not name.startswith(".lock")} == {
        "config.json",
        "metrics.jsonl",
        "routing",
        "evaluations",
        "checkpoints",
        "tensorboard",
    }
    assert sorted(os.listdir(workdir / "checkpoints"), key=int) == ["6", "12"]
    assert sorted(os.listdir(workdir / "routing")) == ["1.npz", "12.npz", "4.npz", "8.npz"]
    (events,) = (workdir / "tensorboard").iterdir()
    assert events.stat().st_size > 1000
    with np.load(workdir / "routing" / "12.npz") as arrays:
        assert {"01_moe/assigned", "01_moe/processed", "01_moe/dropped"} <= set(arrays)


def test_the_record_says_what_was_set_and_by_whom(workdir):
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["train"]["steps"] == STEPS
    assert record["provenance"]["train.steps"] == "command line"
    assert record["provenance"]["data.name"] == "file"
    assert record["provenance"]["optimizer.b2"] == "default"
    environment = record["environment"]
    assert environment["devices"][0] == 1
    assert environment["packages"]["jax"] and environment["python"]
    assert "multiply-add" in environment["flops_convention"]
    assert len(environment["corpus"]["hash"]) == 64
    assert environment["command"][1:3] == ["train", CONFIG]


def test_lines_of_the_display(first):
    """Aligned lines where there is no terminal: a header, a line per row, and no control characters."""
    header, *lines = first[1].splitlines()
    table = [line for line in lines if line.startswith(("train ", "eval "))]
    assert [line.split()[1] for line in table if line.startswith("train ")] == ["1/12", "4/12", "8/12", "12/12"]
    assert [line.split()[1] for line in table if line.startswith("eval ")] == ["5/12", "10/12", "12/12"]
    assert {len(line) for line in table} == {len(header)}
    for column in ("step", "loss", "bits/byte", "tokens/s", "drop %", "load max/mean", "ETA"):
        assert column in header
    assert "\x1b" not in first[1]


def test_it_can_be_evaluated_and_taken_up_again(first, workdir):
    """From the folder alone: the numbers of the last row; and that there is nothing left to do."""
    evaluated = process("eval", "--workdir=runs/tiny", cwd=first[0])
    row = rows(workdir, "eval")[STEPS]
    assert evaluated.err == ""
    for key in ("loss", "cross_entropy", "bits_per_byte", "moe/drop_fraction", "targets", "tokens"):
        assert evaluated.json[key] == row[key]
    again = here(*arguments("train", f"--workdir={workdir}", **CHANGES))
    assert again.status == 0, again.err
    assert f"finished: this run has done its {STEPS} steps" in again.out


def test_the_record_alone_repeats_the_run(workdir, tmp_path):
    """`config.json` is all that is needed, and the losses are the same to the last bit."""
    shutil.copy(workdir / "config.json", tmp_path)
    done = process("train", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'again'}")
    assert done.status == 0, done.err
    assert losses(tmp_path / "again") == losses(workdir)
    first, second = (json.loads((run / "config.json").read_text()) for run in (workdir, tmp_path / "again"))
    assert (first["config"], first["provenance"]) == (second["config"], second["provenance"])


def test_a_mesh_needs_nothing_but_the_flag(workdir, tmp_path):
    """A machine without accelerators shows as many devices as the mesh has."""
    done = process(*arguments("train", f"--workdir={tmp_path / 'run'}", "--mesh=2,2,2", **CHANGES))
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["environment"]["devices"][0] == 8
    assert record["provenance"]["mesh.tensor"] == "command line"
    assert list(losses(tmp_path / "run")) == list(losses(workdir))
    for step, loss in losses(workdir).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-5)
