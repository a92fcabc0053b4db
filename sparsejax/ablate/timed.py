"""Step times of arms, measured in turn in a process of their own, as the process of the study itself uses no device.

    python -m sparsejax.ablate.timed CONFIG.json CONFIG.json …     # prints [seconds, seconds, …]

A time is measured once: `step_times.json` in the study's folder keeps it, so that a resumed study sizes its arms as it
did before."""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsejax.base.config import load, to_json
from sparsejax.base.errors import RunError
from sparsejax.base.writers import write_atomically
from sparsejax.train.config import ExperimentConfig

ROUNDS = 40


class StepTimes:
    """Seconds of a training step over those of the base's, both measured in turn."""

    def __init__(self, workdir: Path, base: ExperimentConfig):
        self.path, self.base = workdir / "step_times.json", base
        self.known: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def ratio(self, config: ExperimentConfig) -> float:
        """Measured unless it is known. Raises `RunError` if a step does not run."""
        base, this = _step_of(self.base), _step_of(config)
        if base == this:
            return 1.0
        key = hashlib.sha256(f"{base}\n{this}".encode()).hexdigest()[:16]
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                files = [Path(folder) / name for name in ("base.json", "arm.json")]
                for file, text in zip(files, (base, this), strict=True):
                    file.write_text(text)
                first, second = measured(files)
            self.known[key] = second / first
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.known, indent=1).encode())
        return self.known[key]


def measured(files: Sequence[Path]) -> list[float]:
    """Median seconds of a training step of each config file. Raises `RunError` if one does not run."""
    command = [sys.executable, "-m", "sparsejax.ablate.timed", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RunError(f"a step could not be timed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _step_of(config: ExperimentConfig) -> str:
    """What a step's time depends on, as a config.json: however long the training, it takes the time that it takes."""
    default = ExperimentConfig()
    optimizer = replace(config.optimizer, schedule=default.optimizer.schedule)
    train = replace(default.train, accumulation=config.train.accumulation, consistency=config.train.consistency)
    return to_json(replace(config, optimizer=optimizer, train=train, eval=default.eval), {}, {})


def _main(files: Sequence[str]) -> None:
    import jax

    from sparsejax.base.devices import prepare_devices
    from sparsejax.base.sharding import make_mesh
    from sparsejax.train.timing import Step, interleaved

    configs = [load(ExperimentConfig, file).config for file in files]
    prepare_devices(max(abs(int(np.prod(config.mesh.shape))) for config in configs))
    calls = {}
    for file, config in zip(files, configs, strict=True):
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            step = Step(config)

        def call(step: Step = step, mesh: jax.sharding.Mesh = mesh) -> object:
            with jax.set_mesh(mesh):
                return step()

        calls[file] = call
    seconds = interleaved(calls, ROUNDS)
    print(json.dumps([float(np.median(seconds[file])) for file in files]))


if __name__ == "__main__":
    _main(sys.argv[1:])
