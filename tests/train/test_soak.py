"""One run, killed twenty times at random: workers, the coordinator, in the middle of a save, of a restore.

Run:     python -m pytest -q -s tests/train/test_soak.py
Expect:  every survivor says who is gone and ends with status 1, at most 20 seconds after; the run ends at the loss of a
         run that nobody disturbed, every row of it equal bit by bit. A quarter of an hour on two busy cores.
"""

import random
import time

import pytest

from runs import arguments, job, losses, newest_step

KILLS, BETWEEN = 20, 12
MOMENTS = ("step", "save", "restore")


def settings(kills):
    return {
        "train__steps": (kills + 1) * BETWEEN,
        "train__log_every": 1,
        "checkpoint__every": 4,
        "eval__every": 50,
        "eval__batches": 1,
    }


def command(workdir, kills):
    return arguments("train", f"--workdir={workdir}", "--mesh=1,2,1", **settings(kills))


def until(happened, started):
    """Waits for it, as long as all go on."""
    end = time.monotonic() + 200
    while time.monotonic() < end and all(child.poll() is None for child in started.processes):
        if happened():
            return
        time.sleep(0.002)
    raise AssertionError([(each.status, each.out, each.err) for each in started.results(1)])


def strike(started, workdir, moment, victim, draw):
    """Kills one process at such a moment. Returns how many seconds later the other has ended, having said why."""
    owner, saves = workdir / ".lock.owner", workdir / "checkpoints"
    before = owner.read_bytes() if owner.exists() else b""
    done = newest_step(workdir)
    claimed = lambda: owner.exists() and owner.read_bytes() not in (b"", before)  # noqa: E731
    until(claimed, started)
    if moment == "restore":  # follows on the claim
        time.sleep(draw.random() * 0.5)
    else:
        wanted = done + draw.randrange(4, BETWEEN)
        until(lambda: newest_step(workdir) >= wanted, started)
        if moment == "save":
            until(lambda: any("tmp" in path.name for path in saves.iterdir()), started)
        time.sleep(draw.random() * 0.02)
    started.processes[victim].kill()
    killed = time.monotonic()
    survivor = started.results(60)[1 - victim]
    gone = "process 0, the coordinator, is gone" if victim == 0 else "process 1 is gone (no heartbeat for 20 s)"
    assert survivor.status == 1 and f"failed: {gone}" in survivor.err.splitlines(), survivor
    return time.monotonic() - killed


def soak(folder, kills, seed):
    """(losses of the run that was killed so often, losses of the one that was not)."""
    draw, workdir, slowest = random.Random(seed), folder / "killed", 0.0
    for kill in range(kills):
        moment, victim = MOMENTS[kill % 3] if kill else "step", draw.randrange(2)
        with job(*command(workdir, kills), count=2) as started:
            seconds = strike(started, workdir, moment, victim, draw)
        slowest = max(slowest, seconds)
        print(f"kill {kill + 1}: process {victim} at a {moment}, after step {newest_step(workdir)}, {seconds:.1f} s")
    for run in (workdir, folder / "undisturbed"):
        with job(*command(run, kills), count=2) as started:
            assert {each.status for each in started.results()} == {0}
    print(f"{kills} kills; the slowest survivor ended {slowest:.1f} s after; {losses(workdir)[(kills + 1) * BETWEEN]}")
    return losses(workdir), losses(folder / "undisturbed")


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path):
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it when the test fails
    killed, undisturbed = soak(tmp_path, KILLS, seed)
    assert killed == undisturbed
