"""Runs of a study in processes of their own: failures, resuming, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsejax.cli import main

ROOT = Path(__file__).parents[2]
SETTINGS = {"train.steps": 4, "train.log_every": 2, "checkpoint.every": 2, "eval.batches": 2}
TINY = [f"--config.{key}={value}" for key, value in SETTINGS.items()] + ["--config.optimizer.schedule.warmup_steps=1"]
STUDY = """
from sparsejax.ablate import Arm, Study

STUDY = Study(
    question="Which learning rate?",
    config="configs/tiny.py",
    arms={{{arms}}},
    base="a",
    varies=("optimizer.learning_rate", "train.max_nonfinite"),
    seeds={seeds},
)
"""
ARMS = '"a": Arm(), "b": Arm(edits={"optimizer.learning_rate": 1e-4})'


@pytest.fixture
def folder(tmp_path):
    """Of a study in a project of its own."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def write_study(folder: Path, arms: str = ARMS, seeds: str = "(0, 1)") -> list[str]:
    """The words of its command."""
    path = folder / "experiments" / "rates.py"
    path.write_text(STUDY.format(arms=arms, seeds=seeds))
    return ["ablate", str(path), f"--workdir={folder / 'runs'}", *TINY]


def results(folder: Path) -> dict:
    return json.loads((folder / "runs" / "rates.json").read_text())


def without_times(found):
    """Without seconds, and the command, which names the folder."""
    if isinstance(found, dict):
        return {key: without_times(each) for key, each in found.items() if key not in ("seconds", "command")}
    return found


def test_a_study_runs_and_a_second_call_does_nothing(folder, capsys):
    words = write_study(folder)
    assert main([*words, "--dry-run"]) == 0
    assert "4 runs, 0 of them done" in capsys.readouterr().out and not (folder / "runs" / "a").exists()
    assert main([*words, "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert "[4/4, 0:00:00 left]" in out and "b: " in out
    found = results(folder)
    assert set(found["verdicts"]) == {"b"}
    assert found["arms"]["b"]["differs"] == {"optimizer.learning_rate": ["0.003", "0.0001"]}
    page = (folder / "runs" / "rates.md").read_text()
    (folder / "runs" / "rates.md").write_text(page + "\n## Reading\n\nWords of mine.\n")
    assert main(words) == 0
    assert "4 runs, 4 of them done" in capsys.readouterr().out
    assert without_times(results(folder)) == without_times(found)
    assert (folder / "runs" / "rates.md").read_text() == page + "\n## Reading\n\nWords of mine.\n"
    # Another config for the same arm is not mixed with it.
    assert main([*words, "--config.model.d_model=64"]) == 2
    assert "holds arm a with another config: config.model.d_model was 32, is 64" in capsys.readouterr().err


def test_a_failed_arm_is_told_with_its_cause_and_the_rest_go_on(folder, capsys):
    words = write_study(
        folder, ARMS + ', "nan": Arm(edits={"optimizer.learning_rate": 1e38, "train.max_nonfinite": 1})', "(0,)"
    )
    assert main(words) == 1
    found = results(folder)
    assert found["arms"]["nan"]["runs"]["0"]["status"] == "failed"
    assert "status 1" in found["arms"]["nan"]["runs"]["0"]["cause"]
    assert [found["arms"][arm]["runs"]["0"]["status"] for arm in "ab"] == ["done", "done"]
    assert "`nan` seed 0: failed: status 1" in (folder / "runs" / "rates.md").read_text()
    assert "failed: nan seed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--arms=c"], "--arms=c: no such arm; those: a, b"),
        (["--scale=huge"], "--scale=huge: no such scale; those: none"),
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
    done = subprocess.run([*command[:4], f"--workdir={again}", *TINY, "--jobs=2"], env=environment)
    assert done.returncode == 0
    assert without_times(found) == without_times(json.loads((again / "rates.json").read_text()))
