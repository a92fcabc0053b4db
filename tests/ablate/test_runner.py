"""Runs of a study in processes of their own: failures, resuming, kills."""

import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sparsejax.ablate.fairness import Unfair
from sparsejax.ablate.known import evaluated_names
from sparsejax.ablate.results import _once, written_as
from sparsejax.ablate.runner import Job, _Progress
from sparsejax.base.config import load
from sparsejax.base.writers import read_jsonl
from sparsejax.cli import main
from sparsejax.train.config import ExperimentConfig

from projects import ARMS, ROOT, TINY, results, write_study


def without_times(found):
    """Without seconds, and the command, which names the folder."""
    if isinstance(found, dict):
        return {key: without_times(each) for key, each in found.items() if key not in ("seconds", "command")}
    return found


def test_a_study_runs_and_a_second_call_does_nothing(folder, capsys):
    words = write_study(folder, timed=True)
    assert main([*words, "--dry-run"]) == 0
    assert "4 runs, 0 of them done" in capsys.readouterr().out and not (folder / "runs" / "a").exists()
    assert main([*words, "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert "[4/4, 0:00:00 left]" in out and "b: " in out
    found = results(folder)
    assert set(found["verdicts"]) == {"b"}
    assert found["arms"]["b"]["differs"] == {"optimizer.learning_rate": ["0.003", "0.0001"]}
    assert found["arms"]["a"]["step_time"] == 1 and 0.3 < found["arms"]["b"]["step_time"] < 3
    assert found["arms"]["b"]["runs"]["1"]["figures"]["arms_of_seed"] == 2
    assert found["variants"]["cut"]["runs"]["0"]["figures"] == {"arms_of_seed": 0.5}
    page = (folder / "runs" / "rates.md").read_text()
    assert "| `cut` | 0.500 ± 0.000 |" in page and "time of a step" in page
    report = (folder / "runs" / "report.html").read_text()
    assert "<h2>Verdicts</h2>" in report and "<h3>a/0</h3>" in report and len(report) < 5_000_000
    (folder / "runs" / "rates.md").write_text(page + "\n## Reading\n\nWords of mine.\n")
    assert main([*words, "--jobs=2"]) == 0
    assert "4 runs, 4 of them done" in capsys.readouterr().out
    assert without_times(results(folder)) == without_times(found)
    assert (folder / "runs" / "rates.md").read_text() == page + "\n## Reading\n\nWords of mine.\n"
    assert (folder / "experiments" / "rates.calls").read_text() == "a b\n" * 2
    config = load(ExperimentConfig, str(folder / "runs" / "a" / "config.json")).config
    rows = read_jsonl(folder / "runs" / "a" / "0" / "metrics.jsonl")[0]
    names = {key for row in rows if row["split"] == "eval" for key in row}
    assert evaluated_names(config) == names - {"step", "split"}
    # Another config for the same arm is not mixed with it.
    assert main([*words, "--config.model.d_model=64"]) == 2
    assert "holds arm a with another config: config.model.d_model was 32, is 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words, message",
    [
        (
            "metric='bits_per_bite'",
            [],
            "no figure of an evaluation of a;.*Did you mean 'bits_per_byte'",
        ),
        ("shown=('moe/drop',)", [], "shown='moe/drop' is a figure of no arm"),
        ("size='train.stepz'", [], "size='train.stepz' is no key of any arm's config. Did you mean 'train.steps'"),
        ("varies=('optimiser',)", [], "varies='optimiser' is no key of any arm's config. Did you mean 'optimizer'"),
        ("", ["--config.train.seed=3"], "--config.train.seed=3 has no effect: seeds are the study's"),
        ("", ["--launch=slrum"], "--launch=slrum: error:.*slurm"),
    ],
)
def test_what_a_study_cannot_have_is_refused_before_it_runs(folder, capsys, settings, words, message):
    arms = 'dict(a=Arm(), b=Arm(edits={"optimizer.learning_rate": 1e-4}, size="train.steps"))'
    fields = f"question='?', config='configs/tiny.py', arms={arms}, base='a', equal='tokens'"
    known = "" if "varies" in settings else "varies=('optimizer',), "
    path = folder / "experiments" / "wrong.py"
    path.write_text(f"from sparsejax.ablate import Arm, Study\nSTUDY = Study({fields}, {known}{settings})\n")
    assert main(["ablate", str(path), f"--workdir={folder / 'runs'}", *TINY, *words, "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err) and not (folder / "runs" / "a").exists()


def test_a_figure_that_one_arm_has_may_be_shown(folder, capsys):
    path = folder / "experiments" / "shown.py"
    arms = "dict(a=Arm(edits={'model.pattern': 'dense'}), b=Arm(edits={'model.pattern': 'moe'}))"
    more = "varies=('model',), shown=('moe/drop_fraction', 'train/grad_norm')"
    fields = f"question='?', config='configs/tiny.py', arms={arms}, base='a', equal='tokens', {more}"
    path.write_text(f"from sparsejax.ablate import Arm, Study\nSTUDY = Study({fields})\n")
    assert main(["ablate", str(path), f"--workdir={folder / 'runs'}", *TINY, "--dry-run"]) == 0


def test_a_failed_arm_is_told_with_its_cause_and_the_rest_go_on(folder, capsys):
    fails = '"nan": Arm(edits={"optimizer.learning_rate": 1e38, "train.max_nonfinite": 1})'
    begun = '"after": Arm(begin="nan", exploratory=True), "on": Arm(begin="a", exploratory=True)'
    assert main(write_study(folder, f'"a": Arm(), {fails}, {begun}', "(0,)")) == 1
    runs = {name: arm["runs"]["0"] for name, arm in results(folder)["arms"].items()}
    assert {name: run["status"] for name, run in runs.items()} == {
        "a": "done",
        "nan": "failed",
        "after": "failed",
        "on": "done",
    }
    assert "status 1" in runs["nan"]["cause"] and "nan seed 0, failed" in runs["after"]["cause"]
    # What begins with a trained model is ahead of what does not.
    assert runs["on"]["figures"]["bits_per_byte"] < runs["a"]["figures"]["bits_per_byte"]
    assert "`nan` seed 0: failed: status 1" in (folder / "runs" / "rates.md").read_text()
    out = capsys.readouterr().out
    assert "failed: nan seed 0" in out and "[4/4, 0:00:00 left] on seed 0" in out


def test_a_metric_that_runs_lack_ends_the_study_after_the_first(folder, capsys, monkeypatch):
    """Evaluation may give null for what it has a name for."""
    monkeypatch.setattr("sparsejax.ablate.command.check_names", lambda study, arms: None)
    words = write_study(folder, seeds="(0,)")
    study = folder / "experiments" / "rates.py"
    study.write_text(study.read_text().replace('base="a"', 'base="a", metric="accuracy_of_mine"'))
    for _ in range(2):  # again, with the run that is done
        assert main([*words, "--jobs=1"]) == 2
        assert "metric='accuracy_of_mine' is no figure of" in capsys.readouterr().err
        assert (folder / "runs" / "a" / "0").exists() and not (folder / "runs" / "b" / "0").exists()


def test_an_unfair_pair_of_runs_is_told_as_soon_as_both_are_done(folder, capsys, monkeypatch):
    """Of runs whose evaluations counted other targets; the arm gets no verdict."""
    pair = [Unfair("denominator", "b", "targets of the evaluation was 9, not 10")]
    monkeypatch.setattr("sparsejax.ablate.results.unfair_runs", lambda base, run, arm: pair if arm == "b" else [])
    arms = f'{ARMS}, "c": Arm(edits={{"optimizer.learning_rate": 1e-4}})'
    assert main([*write_study(folder, arms, "(0, 1)"), "--jobs=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [place for place, line in enumerate(lines) if "denominator: targets" in line]
    assert len(told) == 1 and lines[told[0]].endswith("it gets no verdict")
    assert told[0] < next(place for place, line in enumerate(lines) if line.endswith("c seed 0"))
    found = results(folder)
    assert set(found["verdicts"]) == {"c"} and found["flags"] == [str(pair[0])]


def test_what_is_left_is_told_by_what_the_steps_before_took(tmp_path):
    jobs = [Job(arm=arm, seed=0, config=tmp_path, workdir=tmp_path / arm, steps=10) for arm in "abcd"]
    progress = _Progress(jobs, slots=2)
    progress.seconds = 40.0
    assert progress.finished(jobs[0]) == "[1/4, 0:01:00 left]"
    progress.seconds += 20  # of a process that made no step
    progress.gave_up(jobs[1])
    assert progress.finished(jobs[2]) == "[3/4, 0:00:15 left]"


def test_figures_are_found_anew_when_their_code_is_another(tmp_path):
    path = tmp_path / "study.py"

    def written(text: str) -> str:
        path.write_text(f'"""A study."""\n{text}\n')
        return written_as(runpy.run_path(str(path))["figures"])

    code = "N = 1\n\ndef figures(run):\n    return N\n"
    first = written(code + "STUDY = 1")
    assert written(f"# why\n{code}STUDY = 2") == first
    assert first not in (written(code.replace("N = 1", "N = 2")), written(code.replace("return N", "return N + 1")))
    found = []
    for of in ("a", "a", "b"):
        assert _once(tmp_path / "x.json", [of], lambda: found.append(of) or len(found)) == len(found)
    assert found == ["a", "b"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no SLURM here (sbatch)")
def test_a_real_cluster_runs_what_this_machine_would(folder, capsys):
    """In a folder that nodes share."""
    words = write_study(folder, seeds="(0,)")
    assert main([*words, "--jobs=1"]) == 0
    alone = without_times(results(folder))
    with tempfile.TemporaryDirectory(dir=Path.home()) as shared:
        words = [each for each in words if not each.startswith("--workdir")]
        words += [f"--workdir={shared}/runs", f"--launch=slurm --sbatch=--output={shared}/%x-%j.log"]
        assert main(words) == 0
        assert capsys.readouterr().out.count("Submitted batch job") == 2
        end = time.monotonic() + 240
        while "2 of them done" not in capsys.readouterr().out:
            assert time.monotonic() < end, [log.read_text() for log in Path(shared).glob("*.log")]
            time.sleep(2)
            assert main([*words, "--dry-run"]) == 0
        assert main(words) == 0
        found = json.loads(Path(shared, "runs", "rates.json").read_text())
    assert without_times(found) == alone


@pytest.mark.parametrize(
    "more, message",
    [
        (["--arms=c"], "--arms=c: no such arm; those: a, b"),
        (["--scale=huge"], "--scale=huge: no such scale; those: wide"),
        (["--seeds=x"], "'x' is not N,N"),
        (["--config.data.nmae=x"], "no such key"),
        (["--jobs=0"], "0"),
    ],
)
def test_a_wrong_request_is_one_line(folder, capsys, more, message):
    assert main([*write_study(folder), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (folder / "runs" / "a").exists()


@pytest.mark.slow
def test_a_study_loses_nothing_to_kills(folder):
    """Ten arms with three seeds and ten kill -9, of the study or of one of its runs, at random moments."""
    arms = ", ".join(
        f'"{"abcdefghij"[i]}": Arm(edits={{"optimizer.learning_rate": {1e-3 * (i + 1)}}})' for i in range(10)
    )
    words = write_study(folder, arms, "(0, 1, 2)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sparsejax", *words, "--jobs=2"]
    rng, killed = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while killed < 10:
                time.sleep(rng.uniform(3, 12))
                assert process.poll() is None, "the study ended before all kills"
                children = subprocess.run(
                    ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
                ).stdout.split()
                victim = process.pid if rng.random() < 0.4 or not children else int(rng.choice(children))
                os.kill(victim, signal.SIGKILL)
                killed += 1
                if victim == process.pid:
                    break
            status = process.wait()
        finally:
            process.kill()
        if status == 0:
            break
    found = results(folder)
    again = folder / "again"
    done = subprocess.run([*command[:5], f"--workdir={again}", *TINY, "--jobs=2"], env=environment)
    assert done.returncode == 0
    assert without_times(found) == without_times(json.loads((again / "rates.json").read_text()))
