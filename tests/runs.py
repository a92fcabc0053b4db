"""Whole commands on a model of a few thousand parameters, in this process (fast) or in one of their own (real)."""

import contextlib
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from sparsejax import cli
from sparsejax.base import devices
from sparsejax.train import evaluate, loop, restore

import cheap

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'tiny.py'}"
STEPS, LOG_EVERY, EVAL_EVERY, SAVE_EVERY = 12, 4, 5, 3
SMALL = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "data.sequence_length": 16,
    "train.steps": STEPS,
    "train.log_every": LOG_EVERY,
    "train.tensorboard": False,
    "eval.every": EVAL_EVERY,
    "eval.batches": 2,
    "eval.passages": 0,
    "checkpoint.every": SAVE_EVERY,
    "checkpoint.keep": 4,
}
"""What every command that has `CONFIG` runs on. A row falls on step 1, 4, 8 and 12, an evaluation on 5, 10 and 12, and
checkpoints on 3, 6, 9 and 12, so that none of the three hides behind another."""


class Result(NamedTuple):
    """What a command left on the terminal."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a request was refused with."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of what was printed."""
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def arguments(verb: str, *more: str, **overrides: object) -> list[str]:
    """The words of a command on the small experiment. `a__b=c` is `--config.a.b=c`."""
    settings = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    return [verb, CONFIG, *(f"--config.{key}={value}" for key, value in settings.items()), *more]


def here(*argv: str | Path) -> Result:
    """Runs a command in this process, on the devices that it has."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(devices, "prepare_devices", lambda count: None)
        status = cli.main([str(word) for word in argv])
    return Result(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Within, commands on the same config share what `here` would trace and compile for each of them: `jax.jit` knows a
    function again. A new state is made once and copied, for a run donates its own."""
    shared = ("make_optimizer", "make_train_step", "make_eval_step", "abstract_state")
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, evaluate, restore):
            for name in set(shared) & set(vars(module)):
                patch.setattr(module, name, functools.cache(getattr(module, name)))
        first = functools.cache(loop.new_state)
        patch.setattr(loop, "new_state", lambda config, tx: jax.tree.map(jnp.copy, first(config, tx)))
        yield


OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
"""For `environment`: the programs that users run."""


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: compiled programs are kept, and are as cheap as those of the tests."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    } | cheap.together(cheap.FLAGS)
    return os.environ | settings | more


def command(*argv: str | Path) -> list[str]:
    return [sys.executable, "-m", "sparsejax", *map(str, argv)]


def process(*argv: str | Path, variables: Mapping[str, str] = MappingProxyType({}), **options: Any) -> Result:
    """Runs a command as a user does."""
    env = environment(**variables)
    done = subprocess.run(command(*argv), capture_output=True, text=True, check=False, env=env, timeout=300, **options)
    return Result(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def started(*argv: str | Path, variables: Mapping[str, str] = MappingProxyType({})) -> Iterator[subprocess.Popen]:
    """A command that goes on meanwhile; it is gone when the block ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(*argv), **pipes, text=True, env=environment(**variables)) as child:
        try:
            yield child
        finally:
            child.kill()


class Job:
    """The processes of one job on this machine, started. What they print goes to files."""

    def __init__(self, argv: list[str | Path], count: int, folder: Path, variables: Mapping[str, str]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            flags = [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num-processes={count}"]
        self.files = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(count)]
        self.processes = []
        for number, (out, err) in enumerate(self.files):
            with out.open("w") as stdout, err.open("w") as stderr:
                words = command(*argv, *flags, f"--process-id={number}")
                child = subprocess.Popen(words, stdout=stdout, stderr=stderr, env=environment(**variables))
                self.processes.append(child)

    def results(self, timeout: float = 240) -> list[Result]:
        """What each process has left, when all have ended."""
        end = time.monotonic() + timeout
        return [
            Result(child.wait(max(0.1, end - time.monotonic())), out.read_text(), err.read_text())
            for child, (out, err) in zip(self.processes, self.files, strict=True)
        ]


@contextlib.contextmanager
def job(*argv: str | Path, count: int, variables: Mapping[str, str] = MappingProxyType({})) -> Iterator[Job]:
    """A command in so many processes, which go on meanwhile; they are gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        started = Job(list(argv), count, Path(folder), variables)
        try:
            yield started
        finally:
            for child in started.processes:
                child.kill()
                child.wait()


def rows(workdir: Path, split: str) -> dict[int, dict[str, Any]]:
    """Step → row. Raises when the file has a broken line, or a step twice."""
    found: dict[int, dict[str, Any]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == split:
            assert row["step"] not in found, f"step {row['step']} stands twice"
            found[row["step"]] = row
    return found


def losses(workdir: Path) -> dict[int, float]:
    return {step: row["loss"] for step, row in rows(workdir, "train").items()}


def newest_step(workdir: Path) -> int:
    """That of the last row, 0 before there is one. Cheap, and may be called while the run writes."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for those of the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stop_at(step):
    """`Display.update` during which the process is asked to stop, once the row of this step is shown."""

    def update(self, row):
        if row["step"] >= step:
            os.kill(os.getpid(), signal.SIGTERM)

    return update
