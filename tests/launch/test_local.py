"""Processes on this machine: what is started, what becomes of the others when one fails or all are asked to stop."""

import os
import signal
import subprocess
import time

import pytest

from sparsejax.launch import local

from launching import CONFIG, printed
from runs import arguments, here, losses, process
from shell import check_script, program, with_programs

STAND_IN = """
process = sys.argv[-1].removeprefix("--process-id=")
print("process", process, "of", os.environ["JAX_NUM_CPU_DEVICES"], flush=True)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """`script(source)`: the job of two processes with one device each, on a program that stands in for Python."""
    monkeypatch.setattr(local, "KILL_AFTER", 1)

    def script(source):
        stand_in = program(tmp_path, "stand-in", f"if sys.argv[1] == '-c': exit(print(9))\n{STAND_IN}{source}")
        return printed("local", "--processes=2", "--mesh=2,1,1", f"--python={stand_in}")

    return script


def run(text):
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30)
    return done.returncode, sorted(done.stdout.splitlines()), done.stderr


def test_one_process_needs_no_coordinator():
    text = printed("local", "--devices=4", "--mesh=2,2,1", "--python=python")
    check_script(text)
    assert "export JAX_NUM_CPU_DEVICES=4\n" in text and "export JAX_PLATFORMS=cpu\n" in text
    assert f"  python -m sparsejax train {CONFIG} --workdir=runs/tiny --mesh=2,2,1 > >(" in text
    assert "coordinator" not in text and "expect" not in text


def test_flags_of_train_are_passed_on():
    flags = ["--init-from=runs/a b", "--allow-config-change", "--start-timeout=900"]
    text = printed("local", "--processes=2", "--mesh=2,1,1", *flags)
    check_script(text)
    passed = "'--init-from=runs/a b' --allow-config-change --expect-processes=2 --start-timeout=900 --coordinator="
    assert f" --mesh=2,1,1 {passed}" in text


def test_each_process_knows_the_others(script):
    text = script("print(sys.argv)")
    check_script(text)
    status, lines, _ = run(text)
    assert status == 0
    flags = "'--expect-processes=2', '--coordinator=127.0.0.1:9', '--num-processes=2', '--process-id={}']"
    for id in (0, 1):
        assert f"[{id}] process {id} of 1" in lines
        assert any(line.startswith(f"[{id}] ") and line.endswith(flags.format(id)) for line in lines)


def test_the_first_failure_ends_the_others_and_is_the_status(script):
    begun = time.monotonic()
    status, lines, _ = run(script("exit(7) if process == '1' else time.sleep(60)"))
    assert status == 7 and len(lines) == 2
    assert time.monotonic() - begun < 20


def test_a_later_failure_is_not_the_status(script):
    status, _, _ = run(script("time.sleep(0.5 * int(process)); exit(5 + int(process))"))
    assert status == 5


def test_both_streams_are_told_apart_and_unfinished_lines_are_kept(script):
    status, lines, err = run(script("sys.stderr.write('cause'); exit(1)"))
    assert status == 1 and err == ""
    assert {"[0] cause", "[1] cause"} <= set(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all(script, number):
    """TERM as a scheduler sends it, to the script alone; INT as a terminal does, to all of them."""
    text = script(f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # after the first signal, as in training
signal.signal({int(number)}, lambda *_: (print("saved"), exit(0)))
print("ready", flush=True)
time.sleep(20)
exit(3)
""")
    with subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True, start_new_session=True) as job:
        assert job.stdout is not None
        lines = [job.stdout.readline() for _ in range(4)]
        assert sum("ready" in line for line in lines) == 2, lines
        send = os.kill if number == signal.SIGTERM else os.killpg
        send(job.pid, number)
        out, _ = job.communicate(timeout=15)
        assert job.returncode == 0
        assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_has_no_handler_yet(script, number):
    text = script("time.sleep(60)")
    # What runs in the background, such as these tests may, ignores Ctrl-C, and so would a script that it starts.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heard}
    with subprocess.Popen(["bash", "-c", text], **pipes) as job:
        assert job.stdout is not None
        assert all("process" in job.stdout.readline() for _ in range(2))
        send = os.kill if number == signal.SIGTERM else os.killpg
        send(job.pid, number)
        job.communicate(timeout=15)
        assert job.returncode == 143


def test_after_a_signal_nothing_more_is_started(script):
    text = script("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    slowly = text.replace('  pids+=("$!")\n', '  pids+=("$!")\n  sleep 2\n')
    assert slowly != text
    assert run(slowly)[:2] == (143, ["[0] process 0 of 1"])
    at_once = text.replace("for ((id", "kill -TERM $$\nfor ((id")
    assert run(at_once) == (143, [], "")


def test_words_reach_the_command_as_they_are(tmp_path):
    hostile = "a b'c\"$(touch x)`touch y`;&|*"
    stand_in = program(tmp_path, f"stand-in {hostile}", "print([sys.argv[5], os.environ['NOTE']])")
    folder = f"--workdir=runs/{hostile}"
    text = printed("local", folder, f"--env=NOTE={hostile}", f"--python={stand_in}")
    assert run(text)[1] == [f"[0] {[folder, hostile]}"]


def test_submit_runs_it(tmp_path):
    """The same script takes the place of the command: its output, and its exit status."""
    program(tmp_path, "stand-in", "print(' '.join(sys.argv[1:4])); exit(6)")
    done = process("launch", "local", CONFIG, "--python=stand-in", "--submit", variables=with_programs(tmp_path))
    assert (done.status, done.out) == (6, "[0] -m sparsejax train\n")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    words = [*arguments("train"), "--mesh=2,1,1"]
    assert process(*words, f"--workdir={tmp_path / 'one'}").status == 0
    several = ["launch", "local", *words[1:], f"--workdir={tmp_path / 'two'}", "--processes=2", "--submit"]
    done = process(*several)
    assert done.status == 0, done.out
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--devices=2"], "config.mesh: 1×1×1 leaves some of the job's 2 devices idle"),
        (["--devices=2", "--mesh=4,1,1"], "4×1×1 needs 4 devices, there are 2"),
        (["--devices=3", "--mesh=-1,1,1"], "8 rows do not split evenly"),
        (["--processes=4", "--devices=4", "--mesh=1,16,1", "--config.data.batch_size=16"], "num_experts: 8 is not"),
        (["--config.model.attention=splash"], "kernel for TPU and this is a cpu"),
        (["--start-timeout=900"], "--start-timeout=900 has no effect on a job of one process"),
        (["--processes=0"], "'0' is not an int of at least 1"),
        (["--nodes=2"], "unknown flag '--nodes=2' for launch local"),
        (["--env=1A=2"], "'1A=2' is not NAME=VALUE"),
        (["--workdir=a\nb"], "only printable characters"),
    ],
)
def test_what_would_not_start_is_refused(flags, said):
    assert said in here("launch", "local", CONFIG, *flags).error


def test_target_is_named():
    assert "launch what? known: local, slurm" in here("launch", CONFIG).error
    assert "Did you mean 'slurm'?" in here("launch", "slrum", CONFIG).error
    assert "launch needs --config=FILE.py" in here("launch", "local").error
