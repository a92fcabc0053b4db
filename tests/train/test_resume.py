"""Runs that are killed, stopped, moved, damaged or changed, and what resuming them does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sparsejax.train import loop

from runs import (
    LOG_EVERY,
    OPTIMIZED,
    SAVE_EVERY,
    STEPS,
    arguments,
    contents,
    environment,
    here,
    losses,
    process,
    rows,
    started,
)

LONG = {"train__steps": 60, "train__log_every": 1, "checkpoint__every": 5, "eval__every": 20, "eval__batches": 1}
LONG |= {"eval__passages": 2}
"""For runs that something is to happen to: a row every step, a save every few."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The long run, which nobody disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = here(*arguments("train", f"--workdir={workdir}", **LONG))
    assert done.status == 0, done.err
    assert list(losses(workdir)) == list(range(1, 61))
    return workdir


def wait_for_rows(workdir, child, count):
    """Until the run has written so many lines."""
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError((child.poll(), child.communicate()))


def forget(run, after):
    """As if the process had died before a later checkpoint was finished."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) > after:
            shutil.rmtree(folder)


def test_another_table_of_experts_is_no_resumption(tmp_path):
    """It lies in a file beside the run, which no checkpoint has."""
    router, path, run = "model__blocks__moe__router__", tmp_path / "counts.npy", tmp_path / "run"
    hashed = {"selection": "hash", "weight": "raw", "selection.kind": "balanced", "selection.path": path}
    settings = {router + key: value for key, value in hashed.items()} | {
        "train__steps": 3,
        "optimizer__schedule__warmup_steps": 1,
    }
    np.save(path, np.arange(256))
    assert here(*arguments("train", f"--workdir={run}", **settings)).status == 0
    np.save(path, np.arange(256)[::-1])
    words = arguments("train", f"--workdir={run}", **settings)
    assert "the file of config.model.blocks.moe.router.selection.path is another one: it was " in here(*words).error
    assert here(*words, "--allow-config-change").status == 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    """`kill -9` at a random moment, twice; then it may finish. Losses are the same bits, and no step stands twice."""
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}", **LONG)
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it when the test fails
    draw = random.Random(seed)
    killed_at = []
    for rows_before in (draw.randrange(2, 25), draw.randrange(30, 50)):
        with started(*words) as child:
            wait_for_rows(workdir, child, rows_before)
            time.sleep(draw.random() * 0.05)  # anywhere in a step or a save
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert child.returncode == -signal.SIGKILL
        killed_at.append(max(json.loads(line)["step"] for line in whole_lines(workdir)))
    done = process(*words)
    assert done.status == 0, done.err
    assert "resumed from checkpoint" in done.out
    resumed_at = int(done.out.split("resumed from checkpoint ")[1].split()[0])
    assert killed_at[1] - 3 * LONG["checkpoint__every"] < resumed_at <= killed_at[1]
    assert losses(workdir) == losses(uninterrupted)
    for step, row in rows(uninterrupted, "eval").items():
        assert rows(workdir, "eval")[step]["loss"] == row["loss"]
    last, wanted = rows(workdir, "train")[60], rows(uninterrupted, "train")[60]
    assert (last["tokens"], last["flops"]) == (wanted["tokens"], wanted["flops"])
    assert {path.stem for path in (workdir / "routing").iterdir()} == {str(step) for step in range(1, 61)}
    for folder in ("evaluations", "passages", "routing"):
        assert contents(workdir / folder) == contents(uninterrupted / folder)


@pytest.mark.slow
def test_the_same_holds_for_optimized_programs(tmp_path):
    """The other tests compile cheaply; what users run is compiled with all optimisations."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert process(*arguments("train", f"--workdir={whole}", **LONG), variables=OPTIMIZED).status == 0
    words = arguments("train", f"--workdir={killed}", **LONG)
    with started(*words, variables=OPTIMIZED) as child:
        wait_for_rows(killed, child, 17)
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = process(*words, variables=OPTIMIZED)
    assert "resumed from checkpoint" in done.out
    assert losses(killed) == losses(whole)


def whole_lines(workdir):
    return (workdir / "metrics.jsonl").read_text().split("\n")[:-1]


def test_a_signal_stops_the_run_and_a_second_trainer_does_not(uninterrupted, tmp_path):
    """SIGTERM: the step in hand is finished and saved, the status is 0, and the same command goes on from there.

    While the first trainer holds the folder, a second one is refused, and the first does not notice.
    """
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}", **LONG)
    with started(*words) as child:
        wait_for_rows(workdir, child, 7)
        child.send_signal(signal.SIGSTOP)  # so that it is still there when the second one comes
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)  # all its threads have stopped
        before = contents(workdir)
        assert f"another trainer holds workdir {workdir} (pid {child.pid})" in here(*words).error
        assert contents(workdir) == before
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGCONT)
        out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert "stopped by SIGTERM after step" in out.splitlines()[-1]
    assert "the same command resumes there" in out.splitlines()[-1]
    step = int(out.split("after step ")[1].split(",")[0])
    assert 7 <= step < 60
    assert list(losses(workdir)) == list(range(1, step + 1))
    assert (workdir / "checkpoints" / str(step)).is_dir()
    done = here(*words)
    assert done.status == 0, done.err
    assert f"resumed from checkpoint {step} " in done.out
    assert losses(workdir) == losses(uninterrupted)
    assert list(rows(workdir, "eval")) == list(rows(uninterrupted, "eval"))


@pytest.mark.parametrize("step", [5, STEPS])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(finished_run, tmp_path, step):
    """In the middle of the run and at its end: no row of that evaluation, the state is saved, the resume makes up."""
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}")
    evaluate = loop.Evaluator.__call__

    def stopped(self, variables, should_stop):
        def at_every_batch():
            if step == 5 or STEPS in rows(workdir, "train"):
                signal.raise_signal(signal.SIGTERM)
            return should_stop()

        return evaluate(self, variables, at_every_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Evaluator, "__call__", stopped)
        assert f"stopped by SIGTERM after step {step}, saved" in here(*words).out
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert step not in rows(workdir, "eval") and max(rows(workdir, "train")) == step
    assert here(*words).status == 0
    compared = {step: row["loss"] for step, row in rows(workdir, "eval").items()}
    assert compared == {step: row["loss"] for step, row in rows(finished_run, "eval").items()}


def test_an_evaluation_that_the_stop_swallowed_is_made_up_for(finished_run, tmp_path, monkeypatch):
    """Stopped right after step 5, where an evaluation was due: the resumed run begins with it."""
    workdir = tmp_path / "run"
    words = arguments("train", f"--workdir={workdir}")
    add = loop._Run._add

    def stop_in_step_5(self, report, batch, state):
        add(self, report, batch, state)
        if int(report.step) == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_add", stop_in_step_5)
        assert "stopped by SIGTERM after step 5" in here(*words).out
    assert list(rows(workdir, "eval")) == []
    assert here(*words).status == 0
    compared = {step: row["loss"] for step, row in rows(workdir, "eval").items()}
    assert compared == {step: row["loss"] for step, row in rows(finished_run, "eval").items()}


def test_a_run_goes_on_on_another_mesh(run_copy, finished_run):
    """From one device to eight: the same losses, but for the order in which sums are taken."""
    forget(run_copy, after=SAVE_EVERY)
    done = here(*arguments("train", f"--workdir={run_copy}", "--mesh=2,2,2"))
    assert done.status == 0, done.err
    assert f"resumed from checkpoint {SAVE_EVERY} " in done.out
    assert "changed: config.mesh.expert was 1, is 2" in done.out
    before, after = losses(finished_run), losses(run_copy)
    assert list(before) == list(after)
    for step, loss in before.items():
        assert after[step] == pytest.approx(loss, rel=1e-5)
    assert any(after[step] != loss for step, loss in before.items()), "bit-identical: was it another mesh at all?"


def test_a_row_that_a_checkpoint_cut_in_two_has_the_counts_of_both_parts(run_copy, finished_run):
    """Rows fall on 8 and 12, the checkpoint on 9: the row of 12 is of four steps, as if nothing had happened."""
    forget(run_copy, after=9)
    assert "resumed from checkpoint 9 " in here("train", f"--workdir={run_copy}").out
    timing = {"seconds", "step_seconds", "tokens_per_second", "data_wait_fraction"}
    ours, theirs = (rows(run, "train")[STEPS] for run in (run_copy, finished_run))
    assert ours["window_steps"] == LOG_EVERY
    assert {k: v for k, v in ours.items() if k not in timing} == {k: v for k, v in theirs.items() if k not in timing}
    with np.load(run_copy / "routing" / f"{STEPS}.npz") as a, np.load(finished_run / "routing" / f"{STEPS}.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in b.files)


def test_a_finished_run_says_so_and_compiles_no_step(run_copy, monkeypatch):
    def not_wanted(*_):
        raise AssertionError("the train step was made")

    monkeypatch.setattr(loop, "make_train_step", not_wanted)
    before = contents(run_copy)
    done = here(*arguments("train", f"--workdir={run_copy}"))
    assert done.status == 0, done.err
    assert f"finished: this run has done its {STEPS} steps (train.steps={STEPS})" in done.out
    assert "validation: cross-entropy" in done.out
    after = contents(run_copy)
    assert {name for name in before if before[name] != after[name]} <= {"config.json"}
    assert before.keys() == after.keys()


def test_the_workdir_alone_says_what_to_resume(run_copy, finished_run):
    forget(run_copy, after=9)
    done = here("train", f"--workdir={run_copy}")
    assert done.status == 0, done.err
    assert "resumed from checkpoint 9 " in done.out
    assert losses(run_copy) == losses(finished_run)
    before, after = (json.loads((run / "config.json").read_text()) for run in (finished_run, run_copy))
    assert (before["config"], before["provenance"]) == (after["config"], after["provenance"])


def test_a_changed_config_is_refused(run_copy):
    before = contents(run_copy)
    changed = {"model__blocks__moe__d_ff": 48, "optimizer__learning_rate": 0.5}
    error = here(*arguments("train", f"--workdir={run_copy}", **changed)).error
    assert "config.model.blocks.moe.d_ff was None, is 48" in error
    assert "config.optimizer.learning_rate was 0.003, is 0.5" in error
    assert "--allow-config-change" in error
    assert contents(run_copy) == before


def test_a_changed_config_goes_on_when_told_to(run_copy, finished_run):
    forget(run_copy, after=9)
    words = arguments("train", f"--workdir={run_copy}", "--allow-config-change", optimizer__learning_rate=0.5)
    done = here(*words)
    assert done.status == 0, done.err
    assert "changed: config.optimizer.learning_rate was 0.003, is 0.5" in done.out
    assert losses(run_copy)[8] == losses(finished_run)[8]
    assert losses(run_copy)[STEPS] != losses(finished_run)[STEPS]
    assert json.loads((run_copy / "config.json").read_text())["config"]["optimizer"]["learning_rate"] == 0.5


def test_a_checkpoint_of_another_model_is_refused_whatever_is_allowed(run_copy):
    before = contents(run_copy)
    words = arguments("train", f"--workdir={run_copy}", "--allow-config-change", model__blocks__moe__d_ff=48)
    done = here(*words)
    assert done.status == 2, done.err
    assert done.err.count("\n") == 1
    assert f"checkpoint {STEPS} is of another model" in done.err and "[1, 8, 16, 48]" in done.err
    assert contents(run_copy) == before


def test_settings_that_do_not_touch_what_is_learned_are_free(run_copy, finished_run):
    forget(run_copy, after=9)
    free = {
        "eval__every": 2,
        "eval__batches": 1,
        "checkpoint__every": 100,
        "train__log_every": 1,
        "train__max_nonfinite": 9,
        "data__prefetch": 0,
    }
    done = here(*arguments("train", f"--workdir={run_copy}", **free))
    assert done.status == 0, done.err
    assert list(losses(run_copy)) == [1, 4, 8, 10, 11, 12]
    assert losses(run_copy)[STEPS] == losses(finished_run)[STEPS]
    assert list(rows(run_copy, "eval")) == [5, 10, 12]


def test_another_text_is_flagged(tmp_path, monkeypatch):
    """The same path, but not the same text: losses before and after do not compare."""
    monkeypatch.setenv("SPARSEJAX_CACHE", str(tmp_path / "cache"))
    text, workdir = tmp_path / "corpus.txt", tmp_path / "run"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    words = arguments("train", f"--workdir={workdir}", data__name="text", data__path=text)
    assert here(*words).status == 0
    text.write_text("a quick brown fox jumps over the lazy dog. " * 100)
    before = contents(workdir)
    error = here(*words).error
    assert "the corpus is another one: hash was " in error and "losses do not compare" in error
    assert contents(workdir) == before
    evaluated = here("eval", f"--workdir={workdir}")
    assert "the corpus is another one" in evaluated.json["warning"]
    assert "the corpus is another one" in here(*words, "--allow-config-change").out


def damage(run, step):
    """Takes the last byte off the largest file of a checkpoint."""
    path = max((run / "checkpoints" / str(step) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def test_a_truncated_checkpoint_is_named_and_an_older_one_used(run_copy, finished_run):
    """And so is garbage in metrics.jsonl: a crash may leave anything behind."""
    damage(run_copy, STEPS)
    with (run_copy / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff{"step": \n[1, 2]\n{"step": 13, "split": "train"')
    done = here(*arguments("train", f"--workdir={run_copy}"))
    assert done.status == 0, done.err
    assert f"checkpoint {STEPS} is damaged and not used" in done.err
    assert "removed 3 broken lines" in done.err
    assert "resumed from checkpoint 9 " in done.out
    assert losses(run_copy) == losses(finished_run)
    assert (run_copy / "checkpoints" / f"{STEPS}.damaged").is_dir()


def test_when_all_checkpoints_are_damaged_the_user_decides(run_copy):
    for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY):
        damage(run_copy, step)
    before = contents(run_copy)
    done = here(*arguments("train", f"--workdir={run_copy}"))
    assert done.status == 1
    assert f"\nfailed: no checkpoint in {run_copy / 'checkpoints'} can be used: {STEPS}: " in done.err
    assert contents(run_copy) == before


FULL_DISK = """
import resource, sys
from sparsejax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(run_copy, finished_run):
    """No file may grow beyond 40 kB: metrics fit, a checkpoint does not. The run then goes on from the older one."""
    forget(run_copy, after=SAVE_EVERY)
    (run_copy / "metrics.jsonl").unlink()
    saved = contents(run_copy / "checkpoints")
    assert max(map(len, saved.values())) > 40_000
    words = arguments("train", f"--workdir={run_copy}")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(JAX_ENABLE_COMPILATION_CACHE="false"),
    )
    assert done.returncode == 1, done.stderr
    said, trace = done.stderr.split("\n", 1)
    assert said == "failed: checkpoint 6 could not be written: File too large"
    assert trace.startswith("Traceback") and trace.endswith(f"RunError: {said.removeprefix('failed: ')}\n"), trace
    assert trace.count("Traceback") == 2, trace  # ours and its cause: no library tells it again
    assert contents(run_copy / "checkpoints") == saved
    assert here(*words).status == 0
    for step, loss in losses(run_copy).items():
        assert loss == losses(finished_run)[step]
    assert STEPS in losses(run_copy)
