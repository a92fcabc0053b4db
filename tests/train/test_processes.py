"""Runs of several processes: the numbers of one process, and one end for all."""

import json
import signal
import time

import numpy as np
import pytest

from runs import Result, arguments, job, losses, process, rows

MOE = "01_moe"


def train(workdir, mesh, count, **settings) -> list[Result]:
    """A run in so many processes, to its end."""
    words = arguments("train", f"--workdir={workdir}", f"--mesh={mesh}", **settings)
    if count == 1:
        return [process(*words)]
    with job(*words, count=count) as started:
        return started.results()


def ledger(workdir):
    """(step, name) → integers of `routing/STEP.npz`."""
    found = {}
    for path in (workdir / "routing").iterdir():
        with np.load(path) as arrays:
            found |= {(path.stem, name): arrays[name].tolist() for name in arrays.files if arrays[name].dtype.kind == "i"}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The small run in one process, on two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    (done,) = train(workdir, "1,2,1", 1)
    assert done.status == 0, done.err
    return workdir


def test_two_processes_train_as_one(alone, tmp_path):
    """Bit by bit, down to the counts; and the second writes and says nothing."""
    workdir = tmp_path / "run"
    done = train(workdir, "1,2,1", 2)
    assert [each.status for each in done] == [0, 0], done
    assert "train  12/12" in done[0].out and "train" not in done[1].out
    assert losses(workdir) == losses(alone)
    for split in ("train", "eval"):
        for step, row in rows(alone, split).items():
            timing = {"seconds", "step_seconds", "tokens_per_second", "data_wait_fraction"}
            assert {k: v for k, v in rows(workdir, split)[step].items() if k not in timing} == {
                k: v for k, v in row.items() if k not in timing
            }
    assert ledger(workdir) == ledger(alone)
    assert {path.name for path in workdir.iterdir() if not path.name.startswith(".")} == {
        path.name for path in alone.iterdir() if not path.name.startswith(".")
    }
    assert json.loads((workdir / "config.json").read_text())["environment"]["processes"] == 2
