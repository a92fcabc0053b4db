"""What every launcher starts: one command for all processes, after the checks that it can start at all."""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Optional, cast

import jax
import numpy as np

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.sharding import AXES, check_slices
from sparsejax.launch.flags import check_printable
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_devices

STOPPED = 75
"""Status of a run that a signal stopped before its end: saved, to be resumed. EX_TEMPFAIL of sysexits.h."""
KILLED = 143
"""Status of a process that SIGTERM found before it could handle it; there was nothing new to save."""
WRONG = 2
"""Status of a request that is wrong, and would be the next time."""

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `launch` was asked for. `words` is its whole command line, `overrides` are the settings in it."""

    config: ExperimentConfig
    file: str
    workdir: Path
    overrides: Sequence[tuple[str, str]]
    init_from: Optional[Path]
    allow_config_change: bool
    start_timeout: Optional[int]
    words: Sequence[str]

    def __post_init__(self):
        check_printable(self.words)

    @property
    def comment(self) -> str:
        """The command that prints the job again, in one line."""
        return "# python -m sparsejax " + shlex.join(word for word in self.words if word != "--submit")

    @property
    def stem(self) -> str:
        """The name of the config's file, or of its folder for a run's config.json."""
        file = Path(self.file.partition(".py")[0])
        return file.parent.name if file.suffix == ".json" else file.name

    def train(self, processes: int, devices: int, platform: Platform, slices: int = 1) -> list[str]:
        """The words of the training command that follow the interpreter, the same on every process.

        Args:
          processes: of the whole job.
          devices: of each process, all of `platform`.
          slices: in which the devices come.

        Raises:
          RequestError: the config does not go with these devices, or a flag has no effect on one process.
        """
        config = self._checked(processes * devices, platform)
        check_slices(config.mesh, slices)
        mesh = ",".join(map(str, config.mesh.shape))
        settings = [(key, value) for key, value in self.overrides if key not in [f"mesh.{axis}" for axis in AXES]]
        overrides = [f"--config.{key}={value}" for key, value in settings]
        words = ["-m", "sparsejax", "train", f"--config={self.file}", f"--workdir={self.workdir}", f"--mesh={mesh}"]
        words += overrides
        words += [f"--init-from={self.init_from}"] if self.init_from is not None else []
        words += ["--allow-config-change"] if self.allow_config_change else []
        return words + self._together(processes)

    def _together(self, processes: int) -> list[str]:
        wait = [] if self.start_timeout is None else [f"--start-timeout={self.start_timeout}"]
        if processes > 1:
            return [f"--expect-processes={processes}", *wait]
        if wait:
            raise RequestError(f"{wait[0]} has no effect on a job of one process, which waits for none")
        return []

    def _checked(self, devices: int, platform: Platform) -> ExperimentConfig:
        mesh = self.config.mesh.resolve(devices)
        if math.prod(mesh.shape) != devices:
            raise ConfigError(
                "mesh", f"{'×'.join(map(str, mesh.shape))} leaves some of the job's {devices} devices idle"
            )
        config = dataclasses.replace(self.config, mesh=mesh)
        described: Any = SimpleNamespace(
            shape=dict(zip(AXES, mesh.shape, strict=True)), devices=np.array([SimpleNamespace(platform=platform)])
        )
        check_devices(config, cast(jax.sharding.Mesh, described))
        return config


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A script or manifest, and the program that takes it: from its standard input, or else as `bash -c` does."""

    text: str
    program: tuple[str, ...]
    from_stdin: bool


def default_name(stem: str) -> str:
    """A name for the job that every target takes, made of the config's."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")


def check_value(flag: str, value: str, pattern: str, allowed: str, most: int = 63) -> str:
    """The value of a flag that others read, and that would fail only there.

    Raises:
      RequestError: it does not match `pattern`, which is `allowed` in words, or is longer than `most`.
    """
    if not re.fullmatch(pattern, value, re.ASCII) or len(value) > most:
        raise RequestError(f"{flag}={value}: allowed are {allowed}, at most {most} characters")
    return value


def shared_folder(workdir: Path, volume: tuple[str, Path] | None, form: str) -> tuple[str, Path]:
    """`--volume`, which must hold the run: hosts come and go, and each has a disk of its own.

    Raises:
      RequestError: there is none, or the run's folder is not below it.
    """
    if volume is None:
        raise RequestError(
            f"--volume={form} is needed: the run's folder must outlive the hosts, and all of them share it"
        )
    if not workdir.is_relative_to(volume[1]) or ".." in workdir.parts:
        raise RequestError(f"--workdir={workdir} is not below {volume[1]}, the shared folder of --volume")
    return volume


def exports(variables: dict[str, str]) -> list[str]:
    """Lines of shell that set environment variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
