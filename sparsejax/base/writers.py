"""What a run writes while it goes: `metrics.jsonl`, arrays in `FOLDER/STEP.npz` and TensorBoard event files.

A run may be killed at any moment and resumed from a step that it had already passed. Opening a writer with that step
takes back what was written after it, so every (split, step) stands in the files once.
"""

import io
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sparsejax.base.errors import RunError
from sparsejax.base.processes import is_first

Row = Mapping[str, Any]  # a row of metrics: "step", "split" and scalars
Files = Mapping[str, Mapping[str, ArrayLike]]  # of one step: folder -> the arrays of its file
NOTHING: Files = MappingProxyType({})
log = logging.getLogger(__name__)

FOLDERS = ("routing", "evaluations", "passages")
"""Of arrays: counts by expert, the sums of an evaluation's batches, decisions token by token."""


def read_jsonl(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics file, and the number of lines that are none: a crash may have left one."""
    rows = [_parse(line) for line in Path(path).read_bytes().split(b"\n") if line.strip()]
    whole = [row for row in rows if row is not None]
    return whole, len(rows) - len(whole)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file at `path` in one step: a reader, or a crash, sees the old contents or the new.

    Raises `RunError` when it cannot be written; the old contents stay.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror}") from error


class JsonlWriter:
    """Appends rows to a JSON-lines file, each in one write. NaN and infinity, which JSON lacks, become null."""

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        """Continues the file after `resume_step`; rows of later steps and broken lines are removed, with a warning.

        A run that begins anew where another has left rows (its checkpoints are gone) keeps them in a file of their own.
        """
        self.path = Path(path)
        self._last: dict[str, int] = {}  # split -> its newest step
        if resume_step == 0 and self.path.is_file():
            self._set_aside()
        if self.path.exists():
            self._take_back(resume_step)
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error.strerror}") from error

    def has(self, row: Row) -> bool:
        """Whether the file is past the row's step (an evaluation done twice)."""
        return row["step"] <= self._last.get(row["split"], -1)

    def append(self, row: Row) -> bool:
        """Writes the row; False, and nothing written, when the file has it.

        Raises `RunError` when the disk refuses it.
        """
        if self.has(row):
            return False
        line = json.dumps(json_values(row), allow_nan=False).encode() + b"\n"
        try:
            while line:  # a disk that is filling up takes a part and refuses the rest
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error.strerror}") from error
        self._last[row["split"]] = int(row["step"])
        return True

    def close(self) -> None:
        """Closes the file. The writer cannot be used again."""
        os.close(self._file)

    def _set_aside(self) -> None:
        numbered = (self.path.with_name(f"{self.path.stem}.{n}{self.path.suffix}") for n in itertools.count(1))
        old = next(path for path in numbered if not path.exists())
        try:
            self.path.rename(old)
        except OSError as error:
            raise RunError(f"{self.path} could not be renamed: {error.strerror}") from error
        log.warning("there is no checkpoint to go on from; the earlier run's %s is now %s", self.path.name, old)

    def _take_back(self, resume_step: int) -> None:
        try:
            rows, broken = read_jsonl(self.path)
        except OSError as error:
            raise RunError(f"{self.path} could not be read: {error.strerror}") from error
        kept = []
        for row in rows:
            if self._last.get(row["split"], -1) < row["step"] <= resume_step:
                self._last[row["split"]] = row["step"]
                kept.append(row)
        text = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if text != self.path.read_bytes():
            write_atomically(self.path, text)
        if broken:
            log.warning("%s: removed %d broken lines", self.path, broken)
        if len(kept) < len(rows):
            log.warning("%s: removed %d rows after step %d", self.path, len(rows) - len(kept), resume_step)


class ArraysWriter:
    """Writes one `STEP.npz` of arrays a step, each of them whole or not at all."""

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        """Removes the files of steps after `resume_step` and what a crash left unfinished."""
        self.directory = Path(directory)
        for path in self.directory.glob("*.npz"):
            if path.stem.isdecimal() and int(path.stem) > resume_step:
                path.unlink()
        for path in self.directory.glob(".*.npz.tmp"):
            path.unlink()

    def write(self, step: int, arrays: Mapping[str, ArrayLike]) -> None:
        """Writes the arrays, named such as `LAYER/assigned`. Raises `RunError` when the disk refuses them."""
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        write_atomically(self.directory / f"{step}.npz", buffer.getvalue())


class TensorBoardWriter:
    """Writes the scalars of rows as `SPLIT/KEY`, into a new event file that voids the steps after `resume_step`."""

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        from tensorboardX import SummaryWriter  # slow to import, and not everyone wants it

        # An unbounded queue: with a bounded one, a full disk ends the writing thread and then blocks the trainer.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1, max_queue=0, flush_secs=10)

    def write(self, row: Row) -> None:
        """Queues the row's finite numbers; never blocks."""
        for key, value in row.items():
            # Of any other number tensorboardX itself would warn, at every row.
            if key not in ("step", "split") and value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{row['split']}/{key}", float(value), int(row["step"]))

    def close(self) -> None:
        """Writes what is queued. A full disk is not reported here: the same rows stand in `metrics.jsonl`."""
        try:
            self._writer.close()
        except OSError as error:
            log.warning("the TensorBoard files are incomplete: %s", error.strerror)


class MetricsWriter:
    """All the files of a run: a row goes to JSON lines and, if wanted, to TensorBoard; arrays go to `FOLDERS`."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0, tensorboard: bool = True):
        workdir = Path(workdir)
        self._rows = JsonlWriter(workdir / "metrics.jsonl", resume_step)
        self._arrays = {name: ArraysWriter(workdir / name, resume_step) for name in FOLDERS}
        self._events = TensorBoardWriter(workdir / "tensorboard", resume_step) if tensorboard else None

    def write(self, row: Row, files: Files = NOTHING) -> None:
        """Writes the arrays that belong to the row, and then the row: a row that stands in the file has its arrays, and
        one that stood there before keeps them. Raises `RunError` when the disk refuses."""
        if self._rows.has(row):
            return
        for folder, arrays in files.items():
            if arrays:
                self._arrays[folder].write(int(row["step"]), arrays)
        self._rows.append(row)
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()
        if self._events is not None:
            self._events.close()


class NoWriter:
    """What the other processes of a job write, whose files are those of the first."""

    def write(self, row: Row, files: Files = NOTHING) -> None: ...

    def close(self) -> None: ...


Writer = MetricsWriter | NoWriter


def open_writer(workdir: str | os.PathLike, resume_step: int = 0, tensorboard: bool = True) -> Writer:
    """The writer of a run, in the first process."""
    return MetricsWriter(workdir, resume_step, tensorboard) if is_first() else NoWriter()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("split"), str) else None


def json_values(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy's and JAX's scalars as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {key: json_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
