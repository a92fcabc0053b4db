"""The runs of a study, each in a process of its own, as many at once as asked for; resumable after any kill."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from sparsejax.base.writers import read_jsonl
from sparsejax.launch.state import last_words

PATIENCE = 3
"""Times that a run may be killed by a signal without having gone further before it counts as failed."""
HELD = 30
"""Times that a run may find an earlier process of itself still saving; each takes seconds."""
POLL = 0.2
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: an arm with a seed."""

    arm: str
    seed: int
    config: Path  # the arm's config.json
    workdir: Path
    steps: int
    begin: Optional["Job"] = None  # the run whose parameters it begins with

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What its processes said, outside of the run's folder, which is the run's own."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    @property
    def flags(self) -> list[str]:
        """Those of `train`, and of `launch`."""
        words = [f"--config={self.config}", f"--workdir={self.workdir}", f"--config.train.seed={self.seed}"]
        return words if self.begin is None else [*words, f"--init-from={self.begin.workdir}"]

    def step(self) -> int:
        """The last step that its metrics tell of; `steps` only once it has been evaluated there."""
        path = self.workdir / "metrics.jsonl"
        rows = read_jsonl(path)[0] if path.is_file() else []
        last = max((row["step"] for row in rows), default=0)
        evaluated = any(row["step"] == self.steps for row in rows if row["split"] == "eval")
        return last if evaluated else min(last, self.steps - 1)

    @property
    def done(self) -> bool:
        return self.step() == self.steps


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    begun: float
    step: int  # that it began at


def run_all(
    jobs: Sequence[Job], slots: int, say: Callable[[str], None], check: Callable[[Job], object]
) -> dict[tuple[str, int], str]:
    """Runs what is not done yet. Returns the causes of those that failed, by (arm, seed). `check` is given each
    finished run: what it raises ends the study, before other runs take their time."""
    ended = {job for job in jobs if job.done}
    for job in ended:
        check(job)
    waiting = [job for job in jobs if job not in ended]
    todo, running = list(waiting), []
    failed: dict[tuple[str, int], str] = {}
    progress = _Progress(waiting, slots)
    kills: dict[Job, int] = {}
    try:
        while todo or running:
            for job in [*todo]:
                if job.begin is not None and (job.begin.arm, job.begin.seed) in failed:
                    failed[job.arm, job.seed] = f"the run that it begins with, {job.begin.name}, failed"
                    progress.gave_up(job)
                    todo.remove(job)
                elif len(running) < slots and (job.begin is None or job.begin in ended):
                    todo.remove(job)
                    running.append(_start(job))
            for each in [*running]:
                status = each.process.poll()
                if status is None:
                    continue
                running.remove(each)
                job, went = each.job, each.job.step() > each.step
                progress.seconds += time.monotonic() - each.begun
                if status == 0 and job.done:
                    ended.add(job)
                    check(job)
                    say(f"{progress.finished(job)} {job.name}")
                    continue
                kills[job] = (0 if went else kills.get(job, 0)) + 1
                # A run that stopped by itself with status 0 obeyed a signal that asked it to.
                if (status <= 0 and kills[job] < PATIENCE) or (_held(job) and kills[job] < HELD):
                    todo.insert(0, job)
                    continue
                failed[job.arm, job.seed] = _cause(job, status)
                progress.gave_up(job)
                say(f"failed: {job.name}: {failed[job.arm, job.seed]}")
            time.sleep(POLL)
    finally:
        for each in running:  # they save and stop
            each.process.terminate()
        for each in running:
            each.process.wait()
    return failed


def _start(job: Job) -> _Running:
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    if (job.workdir / "checkpoints").is_dir() and any((job.workdir / "checkpoints").glob("[0-9]*")):
        words = [word for word in job.flags if not word.startswith("--init-from")]
    else:
        words = job.flags
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsejax.ablate.child", "train", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return _Running(job, process, time.monotonic(), job.step())


def _held(job: Job) -> bool:
    """Whether it was refused because an earlier process of the same run is still saving."""
    return "another trainer holds" in last_words(job.log)


def _cause(job: Job, status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name} {PATIENCE} times without going further"
    return f"status {status}: {last_words(job.log)}"


class _Progress:
    """How far a study is, and how long it will still take, by the steps that ended runs made and the seconds of their
    processes."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.left = {(job.arm, job.seed): job.steps - job.step() for job in jobs}
        self.count, self.slots, self.steps, self.seconds = len(jobs), slots, 0, 0.0

    def gave_up(self, job: Job) -> None:
        """Of a run that failed, or will never begin: it takes no more time, and the steps that it made count."""
        self.steps += max(0, self.left.pop((job.arm, job.seed)) - (job.steps - job.step()))

    def finished(self, job: Job) -> str:
        self.steps += self.left.pop((job.arm, job.seed))
        left = sum(self.left.values()) * self.seconds / max(self.steps, 1) / self.slots
        minutes, rest = divmod(round(left), 60)
        return f"[{self.count - len(self.left)}/{self.count}, {minutes // 60}:{minutes % 60:02d}:{rest:02d} left]"
