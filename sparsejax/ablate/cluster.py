"""Runs of a study on a cluster: each is handed to `launch` once, and told of when it has failed there."""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from sparsejax.ablate.runner import Job
from sparsejax.base.errors import RequestError
from sparsejax.base.writers import write_atomically
from sparsejax.launch.command import WAITING
from sparsejax.launch.job import default_name
from sparsejax.launch.state import of_jobset, of_slurm

ASKED = "asked for, and no answer was kept\n"
"""Of a mark until the cluster has answered: who is killed between the two does not know whether it took the run."""


class Cluster:
    """`words`: those of `launch`, target first. Jobs are named STUDY-ARM-SEED.

    Raises:
      RequestError: `words` name a job, or two runs would have one name.
    """

    def __init__(self, words: Sequence[str], study: str, jobs: Sequence[Job]):
        self.words, self.jobs = words, jobs
        self.said = f"--launch={shlex.join(words)}"
        if any(word.split("=")[0] == "--name" for word in words):
            raise RequestError(f"{self.said}: --name has no effect: each run's job has a name of its own")
        self.names = {job: default_name(f"{study}-{job.arm}-{job.seed}") for job in jobs}
        first = {name: job for job, name in reversed(self.names.items())}
        for job, name in self.names.items():
            if first[name] != job:
                raise RequestError(f"{self.said}: {first[name].name} and {job.name} would both be named {name}")

    def check(self, job: Job, config: str) -> None:
        """Raises `RequestError` where no such job can be made of this run of this config.json."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(config)
            self._launched(self.said, self._flags(job, file))

    def run(self, say: Callable[[str], None]) -> dict[tuple[str, int], str]:
        """Hands over the runs that are not done. Returns the causes of those that have failed, by (arm, seed).

        Raises `RequestError` when the cluster takes no run."""
        failed: dict[tuple[str, int], str] = {}
        for job in self.jobs:
            if job.done:
                continue
            begin = job.begin
            if begin is not None and (begin.arm, begin.seed) in failed:
                cause = f"the run that it begins with, {begin.name}, failed"
            elif begin is not None and not begin.done:
                say(f"{job.name} waits for {begin.name}, with which it begins")
                continue
            else:
                cause = self._waited(job, say) if self.words[0] in WAITING else self._handed(job, say)
            if cause is not None and not job.done:
                failed[job.arm, job.seed] = cause
                say(f"failed: {job.name}: {cause}")
        return failed

    def _waited(self, job: Job, say: Callable[[str], None]) -> Optional[str]:
        """Of a target that ends with the run."""
        try:
            self._launched(self.words[0], [*self._flags(job), "--submit"])
        except RequestError as error:
            return str(error)
        say(f"ran {job.name}")
        return None

    def _handed(self, job: Job, say: Callable[[str], None]) -> Optional[str]:
        """Of a target that takes the run and answers at once. A file beside the run's folder keeps the answer."""
        mark = job.workdir.with_name(f"{job.seed}.submitted")
        if not mark.is_file():
            write_atomically(mark, ASKED.encode())
            try:
                said = self._launched(f"--launch: {job.name}", [*self._flags(job), "--submit"])
            except RequestError:
                mark.unlink()
                raise
            write_atomically(mark, said.encode())
            say(f"submitted {job.name}: {said.strip()}")
            return None
        said, again = mark.read_text(), f"remove {mark} to submit it again"
        cause = of_jobset(self._launched(self.said, self._flags(job))) if self.words[0] == "jobset" else of_slurm(said)
        if cause is not None:
            return f"{cause}; {again}"
        how = "may have been submitted, but no answer was kept" if said == ASKED else "has been submitted"
        say(f"{job.name} {how}; {again}")
        return None

    def _flags(self, job: Job, config: Optional[Path] = None) -> list[str]:
        flags = job.flags if config is None else [f"--config={config}", f"--workdir={job.workdir}"]
        name = [] if self.words[:1] == ["local"] else [f"--name={self.names[job]}"]  # which is no job of anyone's
        return [*self.words, *name, *flags]

    def _launched(self, about: str, words: Sequence[str]) -> str:
        """What `launch` printed. Raises `RequestError`, which begins with `about`, where it refuses."""
        command = [sys.executable, "-m", "sparsejax", "launch", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            raise RequestError(f"{about}: {lines[-1]}")
        return done.stdout
