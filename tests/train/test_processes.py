"""Runs of several processes: the numbers of one process, and one end for all."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from runs import Result, arguments, contents, here, job, losses, newest_step, process, rows


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
    done = here(*arguments("train", f"--workdir={workdir}", "--mesh=1,2,1", eval__passages=4))
    assert done.status == 0, done.err
    return workdir


def test_two_processes_train_as_one(alone, tmp_path):
    """Bit by bit, down to the counts; and the second writes and says nothing."""
    workdir = tmp_path / "run"
    done = train(workdir, "1,2,1", 2, eval__passages=4)
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
    for folder in ("evaluations", "passages"):
        assert contents(workdir / folder) == contents(alone / folder)
    assert {path.name for path in workdir.iterdir() if not path.name.startswith(".")} == {
        path.name for path in alone.iterdir() if not path.name.startswith(".")
    }
    assert json.loads((workdir / "config.json").read_text())["environment"]["processes"] == 2


@pytest.mark.slow
def test_four_processes_have_the_losses_and_the_ledger_of_one(tmp_path):
    """Their sums go another way round than those among the devices of one, so the last bits differ."""
    runs = {count: tmp_path / str(count) for count in (1, 4)}
    for count, workdir in runs.items():
        done = train(workdir, "2,2,1", count)
        assert {each.status for each in done} == {0}, done
    for split in ("train", "eval"):
        for step, row in rows(runs[1], split).items():
            np.testing.assert_allclose(rows(runs[4], split)[step]["loss"], row["loss"], rtol=1e-6)
    assert ledger(runs[4]) == ledger(runs[1])


def wait_for_steps(workdir, started, count):
    """Until the run has written a row of this step, as long as all go on."""
    end = time.monotonic() + 200
    while time.monotonic() < end and all(child.poll() is None for child in started.processes):
        if newest_step(workdir) >= count:
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


@pytest.mark.slow
def test_a_signal_to_all_saves_once_and_another_job_goes_on(undisturbed, tmp_path):
    """Whatever step each of them hears it at. Then one process, four, and another mesh: the data go on in their order,
    and so do the losses."""
    workdir = tmp_path / "run"
    with job(*arguments("train", f"--workdir={workdir}", "--mesh=1,2,1", **GO_ON), count=2) as started:
        wait_for_steps(workdir, started, 17)
        for child in started.processes:
            child.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        first, second = started.results()
    assert (first.status, second.status) == (0, 0), (first, second)
    step = int(first.out.split("stopped by SIGTERM after step ")[1].split(",")[0])
    assert 17 <= step < 60 and max(losses(workdir)) == step
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved[-1] == step and all(each % GO_ON["checkpoint__every"] == 0 for each in saved[:-1])
    for mesh, count in (("2,1,1", 1), ("2,2,1", 4), ("1,2,2", 2)):
        moved = shutil.copytree(workdir, tmp_path / f"{count}")
        done = train(moved, mesh, count, **GO_ON)
        assert {each.status for each in done} == {0}, done
        assert f"resumed from checkpoint {step}" in done[0].out
        now, before = losses(moved), losses(undisturbed)
        for later in range(step + 1, step + 21):
            np.testing.assert_allclose(now[later], before[later], rtol=1e-5)
        assert rows(moved, "train")[60]["tokens"] == rows(undisturbed, "train")[60]["tokens"]


@pytest.mark.slow
def test_evaluation_in_several_processes_prints_once(alone, tmp_path):
    """On meshes that split rows, experts and hidden widths between processes, with decisions written and taken
    again."""
    words = ("eval", f"--workdir={alone}")
    wanted = process(*words, "--mesh=1,2,1").json
    for mesh, count in (("2,1,1", 2), ("1,1,2", 2), ("2,1,2", 4)):
        trace = tmp_path / f"{mesh}.npz"
        with job(*words, f"--mesh={mesh}", f"--trace={trace}", count=count) as started:
            first, *others = started.results()
        assert {each.status for each in (first, *others)} == {0}, (first, others)
        assert not any("loss" in each.out for each in others)
        np.testing.assert_allclose(first.json["loss"], wanted["loss"], rtol=1e-5)
        with job(*words, "--mesh=2,1,1", f"--replay={trace}", count=2) as started:
            replayed = started.results()[0].json
        np.testing.assert_allclose(replayed["loss"], wanted["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_run_begins_with_another_and_records_decisions(alone, tmp_path):
    """As in one process: the receipt, and the trace of a step, whose rows lie in both."""
    for count in (1, 2):
        settings = {"train__steps": 6, "train__trace": "(2,)"}
        words = arguments("train", f"--workdir={tmp_path / str(count)}", "--mesh=2,1,1", **settings)
        words.append(f"--init-from={alone}")
        if count == 1:
            assert process(*words).status == 0
            continue
        with job(*words, count=count) as started:
            done = started.results()
        assert {each.status for each in done} == {0}, done
    one, two = (json.loads((tmp_path / name / "upcycling.json").read_text()) for name in "12")
    assert one == two
    with np.load(tmp_path / "1" / "traces" / "2.npz") as wanted, np.load(tmp_path / "2" / "traces" / "2.npz") as got:
        assert set(wanted.files) == set(got.files)
        for name in set(wanted.files) - {"about"}:
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


@pytest.mark.slow
def test_losses_that_are_not_finite_end_all_with_their_cause(tmp_path):
    words = arguments("train", f"--workdir={tmp_path / 'run'}", "--mesh=1,2,1", train__max_nonfinite=2)
    words += ["--config.optimizer.learning_rate=1e38", "--config.optimizer.schedule.warmup_steps=0"]
    with job(*words, count=2) as started:
        done = started.results()
    for each in done:
        assert each.status == 1, each
        assert "2 steps in a row were not finite (train.max_nonfinite): " in each.err, each


@pytest.mark.slow
def test_a_mesh_that_leaves_devices_idle_is_refused_by_all(tmp_path):
    words = arguments("train", f"--workdir={tmp_path / 'run'}", "--mesh=1,3,1", data__batch_size=6)
    words.append("--config.model.blocks.moe.num_experts=6")
    with job(*words, count=2) as started:
        done = started.results()
    for each in done:
        assert each.status == 2 and "uses 3 of the 4 devices that 2 processes have" in each.err, each
    assert not (tmp_path / "run").exists()
