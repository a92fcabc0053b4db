"""The batch script: what it asks for, what it makes of each exit status, and a real cluster where there is one."""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from launching import CONFIG, printed
from runs import arguments, command, environment, here, losses, process
from shell import check_script, program, with_programs


def directives(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_gpus_have_a_process_each():
    flags = ["--nodes=2", "--gpus-per-node=4", "--cpus-per-process=6", "--partition=a100", "--time=1-00", "--name=big"]
    text = printed("slurm", *flags, "--mesh=1,8,1", "--python=python", "--sbatch=--qos=high", "--setup=module load x")
    check_script(text)
    assert directives(text) == [
        "--job-name=big",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=6",
        "--partition=a100",
        "--time=1-00",
        "--output=%x-%j.log",
        "--requeue",
        "--open-mode=append",
        "--signal=TERM@120",
        "--qos=high",
    ]
    train = f"python -m sparsejax train {CONFIG} --workdir=runs/tiny --mesh=1,8,1 --expect-processes=8"
    srun = "srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=6"
    assert f"\n  {srun} {train} --stopped-status=75 --distributed=slurm\n" in text
    assert "\nmodule load x\n" in text and "export XLA_FLAGS=" in text and "JAX_PLATFORMS" not in text


def test_cpus_are_split_into_virtual_devices():
    text = printed("slurm", "--processes-per-node=2", "--devices-per-process=2", "--mesh=2,2,1", "--grace=30")
    check_script(text)
    assert {"--job-name=tiny", "--ntasks-per-node=2", "--signal=TERM@30"} <= set(directives(text))
    assert "export JAX_PLATFORMS=cpu\nexport JAX_NUM_CPU_DEVICES=2\n" in text and "XLA_FLAGS" not in text
    assert "--expect-processes=2" in text


def test_one_process_is_started_as_it_is():
    text = printed("slurm")
    assert "--expect-processes" not in text and "--distributed" not in text


def run(text, folder, *statuses):
    """The script on a cluster whose `srun` ends with these statuses in turn: its own status, and what it called."""
    calls = folder / "calls"
    calls.touch()
    note = f"path = {str(calls)!r}; past = open(path).read(); print(*sys.argv[1:], file=open(path, 'a'))\n"
    program(folder, "srun", f"sys.argv = ['', 'srun']; {note}exit({statuses!r}[past.count('srun')])")
    program(folder, "scontrol", note)
    program(folder, "sleep", "")
    variables = with_programs(folder, SLURM_JOB_ID="17")
    done = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True, timeout=30)
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize(
    "statuses, status, calls",
    [
        ([0], 0, ["srun"]),
        ([2], 2, ["srun"]),  # the same request would be refused again
        ([1, 137, 0], 0, ["srun", "srun", "srun"]),
        ([1, 1, 3], 3, ["srun", "srun", "srun"]),
        ([75], 75, ["srun", "requeue 17"]),
        ([1, 143], 143, ["srun", "srun", "requeue 17"]),
    ],
)
def test_what_becomes_of_a_run_that_ended(statuses, status, calls, tmp_path):
    assert run(printed("slurm", "--max-restarts=2"), tmp_path, *statuses) == (status, calls)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--nodes=2"], "config.mesh: 1×1×1 leaves some of the job's 2 devices idle"),
        (["--gpus-per-node=4", "--mesh=1,8,1"], "1×8×1 needs 8 devices, there are 4"),
        (["--gpus-per-node=8", "--devices-per-process=8"], "--devices-per-process has no effect with --gpus-per-node"),
        (["--name=a b"], "--name=a b: allowed are letters, digits"),
        (["--partition=a;b"], "--partition=a;b: allowed are"),
        (["--time=soon"], "--time=soon: allowed are minutes, hours"),
        (["--sbatch=qos=high"], "--sbatch=qos=high: allowed are --FLAG or --FLAG=VALUE"),
        (["--sbatch=--comment=a b"], "--sbatch=--comment=a b: allowed are"),
        (["--image=x"], "unknown flag '--image=x' for launch slurm"),
        (["--config.model.attention=splash", "--gpus-per-node=1"], "kernel for TPU and this is a gpu"),
    ],
)
def test_what_would_not_start_is_refused(flags, said):
    assert said in here("launch", "slurm", CONFIG, *flags).error


@pytest.mark.parametrize("local", ["/tmp", "/var/tmp", "/dev/shm"])
def test_nodes_do_not_share_what_is_temporary(local, monkeypatch):
    nodes = ["launch", "slurm", CONFIG, "--nodes=2", "--mesh=2,1,1"]
    said = "is each node's own; 2 nodes need a shared folder"
    for workdir in (f"{local}/run", f"/home/..{local}/run"):
        assert f"--workdir={workdir} {said}" in here(*nodes, f"--workdir={workdir}").error
    monkeypatch.chdir(local)
    assert f"--workdir=run {said}" in here(*nodes, "--workdir=run", "--submit").error
    for flags in (["--nodes=2", "--mesh=2,1,1", "--workdir=run"], [f"--workdir={local}/run"]):
        assert "srun" in printed("slurm", *flags)  # from elsewhere, or for one node


def test_submit_without_a_cluster_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--submit needs sbatch, which is not on this machine" in here("launch", "slurm", CONFIG, "--submit").error


def test_submit_hands_the_script_to_sbatch(tmp_path, monkeypatch):
    program(tmp_path, "sbatch", f"open({str(tmp_path / 'script')!r}, 'w').write(sys.stdin.read())")
    monkeypatch.setenv("PATH", with_programs(tmp_path)["PATH"])
    assert here("launch", "slurm", CONFIG, "--submit") == (0, "", "")
    assert (tmp_path / "script").read_text() == printed("slurm")
    program(tmp_path, "sbatch", "exit(1)")
    done = here("launch", "slurm", CONFIG, "--submit")
    assert done.status == 1 and done.err.startswith("failed: sbatch does not take the job (status 1)\n")


NODES = 2
"""Of a real cluster. Each has one process with one device."""


def cluster(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


@pytest.fixture
def shared():
    """A folder in the user's own, which the nodes of a cluster share."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no SLURM here (sbatch)")
def test_a_real_cluster_trains_preempts_requeues_and_finishes(shared):
    """The nodes are taken away by a signal to the processes, as when their time is up or another job is preferred, and
    then by `scontrol requeue`. The losses are those of an uninterrupted run in one process."""
    more = {"train__steps": 150, "train__log_every": 1, "checkpoint__every": 1000, "eval__every": 1000}
    alone, workdir = shared / "alone", shared / "run"
    mesh = f"--mesh={NODES},1,1"
    assert process(*arguments("train", f"--workdir={alone}", mesh, **more)).status == 0
    words = arguments("launch", f"--workdir={workdir}", mesh, f"--nodes={NODES}", "--name=test", "--submit", **more)
    words.insert(1, "slurm")
    done = subprocess.run([*command(*words)], cwd=shared, env=environment(), capture_output=True, text=True)
    job = re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)[1]

    def state():
        return re.search(r"JobState=(\w+)", cluster("scontrol", "show", "job", job))[1]

    def step():
        try:
            return max(losses(workdir), default=0)
        except (OSError, ValueError):  # not there yet, or in the middle of a line
            return 0

    reached = 0
    try:
        for take_away in (["scancel", "--signal=TERM", job], ["scontrol", "requeue", job]):
            wait_until(lambda: step() >= reached + 20)
            cluster(*take_away)
            wait_until(lambda: state() == "PENDING")
            reached = step()
            assert reached < 150
            cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for two minutes
        wait_until(lambda: state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
    finally:
        subprocess.run(["scancel", job], check=False)
    log = (shared / f"test-{job}.log").read_text()
    shown = cluster("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in shown and "Restarts=2" in shown and "ExitCode=0:0" in shown, log
    assert log.count("resumed from checkpoint") == 2 and log.count("stopped by SIGTERM") == 2
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-6)
    assert list(losses(workdir)) == list(range(1, 151))
