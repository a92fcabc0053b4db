"""Runs that are handed to a cluster, whose programs are small scripts that do as told."""

import json
import os
from pathlib import Path

import pytest

from sparsejax.ablate.cluster import ASKED
from sparsejax.ablate.machine import limits
from sparsejax.cli import main
from sparsejax.launch.state import of_jobset, of_slurm

from projects import results, write_study


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a script in the place of a program."""
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")

    def written(name: str, script: str) -> None:
        (bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin / name).chmod(0o755)

    return written


def test_a_cluster_is_given_every_run_once(folder, program, capsys):
    program("sbatch", f"cat >> {folder}/jobs\necho Submitted batch job 7")
    program("scontrol", "echo JobId=7 JobState=RUNNING ExitCode=0:0")
    words = [*write_study(folder, seeds="(0,)"), "--launch=slurm --nodes=1"]
    assert main(words) == 0
    assert "submitted b seed 0: Submitted batch job 7" in capsys.readouterr().out
    jobs = (folder / "jobs").read_text()
    for arm in "ab":
        assert f"--config={folder}/runs/{arm}/config.json" in jobs and f"--workdir={folder}/runs/{arm}/0" in jobs
        assert f"#SBATCH --job-name=rates-{arm}-0\n" in jobs
    assert main(words) == 0
    assert f"b seed 0 has been submitted; remove {folder}/runs/b/0.submitted to" in capsys.readouterr().out
    assert (folder / "jobs").read_text() == jobs
    assert results(folder)["arms"]["b"]["runs"]["0"] == {"status": "waiting", "cause": "at step 0 of 4"}
    (folder / "runs" / "b" / "0.submitted").unlink()
    assert main([*words[:-1], "--launch=slurm --no-such-flag"]) == 2
    assert "--launch=slurm --no-such-flag: error: unknown flag" in capsys.readouterr().err
    program("sbatch", "echo the queue is closed >&2; exit 1")
    assert main(words) == 2
    assert "--launch: b seed 0: " in capsys.readouterr().err and not (folder / "runs" / "b" / "0.submitted").exists()
    assert (folder / "jobs").read_text() == jobs


def test_another_scale_has_a_page_and_jobs_of_its_own(folder, program):
    program("sbatch", f"cat >> {folder}/jobs; echo Submitted batch job 7")
    assert main([*write_study(folder, seeds="(0,)"), "--launch=slurm", "--scale=wide", f"--out={folder}/out"]) == 0
    assert sorted(each.name for each in (folder / "out").iterdir()) == [
        f"rates_wide.{end}" for end in ("json", "md", "svg")
    ]
    assert "--job-name=rates-wide-b-0" in (folder / "jobs").read_text()


def test_a_run_that_failed_there_is_told_with_its_cause_and_the_rest_go_on(folder, program, capsys):
    """The first job ran out of time, the others are there. Its mark taken away, it is submitted again."""
    log, count = folder / "7.log", folder / "count"
    log.write_text("step 2\nerror: out of luck\nsrun: task 0 exited\n")
    program("sbatch", f"cat >/dev/null; echo x >> {count}; echo Submitted batch job $((6 + $(wc -l < {count})))")
    program(
        "scontrol",
        f"case $4 in 7) echo JobId=7 JobState=TIMEOUT ExitCode=0:15 StdOut={log} ;; "
        "*) echo JobId=$4 JobState=PENDING ExitCode=0:0 ;; esac",
    )
    arms = '"a": Arm(), "b": Arm(edits={"optimizer.learning_rate": 1e-4}), "on": Arm(begin="a", exploratory=True)'
    words = [*write_study(folder, arms, "(0,)"), "--launch=slurm"]
    assert main(words) == 0
    assert "on seed 0 waits for a seed 0, with which it begins" in capsys.readouterr().out
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "failed: a seed 0: SLURM's job 7 ended as TIMEOUT, exit code 0:15: error: out of luck; remove " in out
    assert "failed: on seed 0: the run that it begins with, a seed 0, failed" in out
    assert "b seed 0 has been submitted" in out
    runs = {name: arm["runs"]["0"]["status"] for name, arm in results(folder)["arms"].items()}
    assert runs == {"a": "failed", "b": "waiting", "on": "failed"}
    (folder / "runs" / "a" / "0.submitted").unlink()
    assert main(words) == 0 and "submitted a seed 0: Submitted batch job 9" in capsys.readouterr().out


def test_who_is_killed_before_the_answer_does_not_submit_twice(folder, program, capsys):
    """sbatch never answers: it kills who asked, as a machine that goes down does."""
    words = [*write_study(folder, seeds="(0,)"), "--launch=slurm"]
    program("sbatch", f"cat >> {folder}/jobs; echo Submitted batch job 7")
    mark = folder / "runs" / "a" / "0.submitted"
    mark.parent.mkdir(parents=True)
    mark.write_text(ASKED)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"a seed 0 may have been submitted, but no answer was kept; remove {mark} to submit it again" in out
    assert "/runs/a/0" not in (folder / "jobs").read_text() and "/runs/b/0" in (folder / "jobs").read_text()


def test_a_target_that_ends_with_the_run_tells_its_failure_and_goes_on(folder, capsys):
    fails = '"nan": Arm(edits={"optimizer.learning_rate": 1e38, "train.max_nonfinite": 1})'
    assert main([*write_study(folder, f'"a": Arm(), {fails}, "c": Arm()', "(0,)"), "--launch=local"]) == 1
    runs = {name: arm["runs"]["0"] for name, arm in results(folder)["arms"].items()}
    assert {name: run["status"] for name, run in runs.items()} == {"a": "done", "nan": "failed", "c": "done"}
    assert "nan: no run is done" in capsys.readouterr().out and "were not finite" in runs["nan"]["cause"]


@pytest.mark.parametrize(
    "arms, edit, launch, message",
    [
        ("ab", "", "slurm --name=mine", "--name has no effect: each run's job has a name of its own"),
        (("a_b", "a.b"), "", "slurm", "a_b seed 0 and a.b seed 0 would both be named rates-a-b-0"),
        ("ab", 'equal="step_time",', "slurm", "equal='step_time' is measured by this process"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(folder, capsys, arms, edit, launch, message):
    words = write_study(folder, ", ".join(f'"{arm}": Arm()' for arm in arms), "(0,)")
    study = folder / "experiments" / "rates.py"
    study.write_text(study.read_text().replace('base="a",', f'base="{arms[0]}", {edit}'))
    assert main([*words, f"--launch={launch}", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo JobId=7 JobState=RUNNING ExitCode=0:0", None),
        ("echo JobId=7 JobState=OUT_OF_MEMORY ExitCode=0:125 StdOut=/none", "OUT_OF_MEMORY, exit code 0:125: it said"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "SLURM no longer knows its job 7"),
        ("echo Unable to contact slurm controller >&2; exit 1", None),
    ],
)
def test_how_a_job_of_slurm_ended(program, script, expected):
    program("scontrol", script)
    found = of_slurm("Submitted batch job 7\n")
    assert found is None if expected is None else found is not None and expected in found
    assert of_slurm(ASKED) is None


@pytest.mark.parametrize(
    "answer, expected",
    [
        ({"kind": "JobSet", "status": {}}, None),
        ({"kind": "JobSet", "status": {"terminalState": "Failed", "conditions": [
            {"status": "False", "message": "running"}, {"status": "True", "message": "jobset failed due to reason x"},
        ]}}, "its JobSet ended as Failed: jobset failed due to reason x"),
        ({"kind": "List", "items": [{"kind": "ServiceAccount"}]}, "the cluster no longer has its JobSet"),
        ({}, "the cluster no longer has its JobSet"),
    ],
)  # fmt: skip
def test_how_a_jobset_ended(program, tmp_path, answer, expected):
    (tmp_path / "answer").write_text(json.dumps(answer) if answer else "")
    program("kubectl", f"cat > {tmp_path}/asked; cat {tmp_path}/answer")
    assert of_jobset("kind: JobSet\n") == expected
    assert (tmp_path / "asked").read_text() == "kind: JobSet\n"
    program("kubectl", "echo no connection >&2; exit 1")
    assert of_jobset("kind: JobSet\n") is None


def test_a_jobset_is_asked_after_by_its_manifest(folder, program, capsys):
    program("kubectl", f'case "$1" in apply) cat >> {folder}/applied; echo jobset created ;; '
            f"*) cat > {folder}/asked; echo '{{}}' ;; esac")  # fmt: skip
    flags = f"--topology=v5e:1x1 --image=i --volume=claim:{folder} --namespace=ours"
    words = [*write_study(folder, seeds="(0,)"), f"--launch=jobset {flags}"]
    assert main(words) == 0 and main(words) == 1
    assert "failed: b seed 0: the cluster no longer has its JobSet; remove" in capsys.readouterr().out
    assert "name: rates-b-0\n  namespace: ours" in (folder / "asked").read_text()
    assert (folder / "applied").read_text().count("kind: JobSet") == 2


def test_the_limits_of_control_groups_are_found(tmp_path: Path):
    """Of a process in two, of version 2 and 1, each within others."""
    own, two, one = tmp_path / "cgroup", tmp_path / "two", tmp_path / "one"
    (two / "a/b").mkdir(parents=True)
    (one / "c").mkdir(parents=True)
    own.write_text("4:memory:/c\n3:cpu:/d\n0::/a/b\n")
    (two / "a/memory.max").write_text("300\n")
    (two / "a/b/memory.max").write_text("max\n")
    (one / "c/limit").write_text("200\n")
    groups = (("0::", two, "memory.max"), (":memory:", one, "limit"))
    assert sorted(limits(own, groups)) == [200, 300]
    assert list(limits(tmp_path / "none", groups)) == []
