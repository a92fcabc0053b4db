"""Runs of several processes: the numbers of one process, and one end for all."""

import json
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
            found |= {
                (path.stem, name): arrays[name].tolist() for name in arrays.files if arrays[name].dtype.kind == "i"
            }
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


def wait_for_steps(workdir, started, count):
    """Until the run has written a row of this step, as long as all go on."""
    end = time.monotonic() + 200
    while time.monotonic() < end and all(child.poll() is None for child in started.processes):
        if (workdir / "metrics.jsonl").exists() and max(losses(workdir), default=0) >= count:
            return
        time.sleep(0.01)
    raise AssertionError([(each.status, each.out, each.err) for each in started.results(1)])


ENDLESS = {"train__steps": 100_000, "train__log_every": 1, "checkpoint__every": 5, "eval__every": 100_000}
GO_ON = {**ENDLESS, "train__steps": 60, "eval__batches": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A longer run, of two processes."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [each.status for each in train(workdir, "1,2,1", 2, **GO_ON)] == [0, 0]
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_the_next_job_goes_on(undisturbed, tmp_path, victim):
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}", "--mesh=1,2,1", **GO_ON)
    with job(*words, count=2) as started:
        wait_for_steps(workdir, started, 23)
        started.processes[victim].kill()
        killed = time.monotonic()
        survivor = started.results()[1 - victim]
        assert time.monotonic() - killed < 60
    assert survivor.status == 1
    told = "process 1 is gone (no heartbeat for 20 s)" if victim == 1 else "process 0, the coordinator, is gone"
    assert f"failed: {told}" in survivor.err.splitlines(), survivor.err
    done = train(workdir, "1,2,1", 2, **GO_ON)
    assert [each.status for each in done] == [0, 0], done
    assert "resumed from checkpoint" in done[0].out
    assert losses(workdir) == losses(undisturbed)
    assert ledger(workdir) == ledger(undisturbed)
