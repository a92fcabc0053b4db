"""A run's folder as it is read: rows, counts per expert, decisions on passages. Every part but `metrics.jsonl` may be
missing; a broken one is a `RequestError` that names its file."""

import functools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np

from sparsejax.base.config import from_json
from sparsejax.base.errors import RequestError
from sparsejax.base.writers import read_jsonl
from sparsejax.train.config import ExperimentConfig

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
FRAMES = 40
"""Steps of a time series of arrays that a page shows: about what a slider can tell apart."""


@dataclass(frozen=True)
class Run:
    """One run. `name` tells it from the others of a page."""

    path: Path
    name: str

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`. Raises `RequestError` where a figure is no number."""
        path = self.path / "metrics.jsonl"
        rows = read_jsonl(path)[0]
        for row in rows:
            for key, value in row.items():
                if key != "split" and value is not None and not isinstance(value, int | float):
                    told = f"{path}: {key} of step {row['step']} ({row['split']}) is {value!r}"
                    raise RequestError(f"{told}; allowed: a number or null")
        return rows

    @functools.cached_property
    def saved(self) -> dict[str, Any]:
        """What `config.json` holds: `config`, `provenance`, `environment`; each may be empty."""
        path = self.path / "config.json"
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: could not be read: {error}") from None
        if not isinstance(found, dict):
            raise RequestError(f"{path}: not what a run writes: no JSON object")
        parts = {"config": {}, "provenance": {}, "environment": {}} | found
        wrong = next((name for name, part in parts.items() if not isinstance(part, dict)), None)
        if wrong is not None:
            raise RequestError(f"{path}: not what a run writes: {wrong} is {parts[wrong]!r}, no JSON object")
        return parts

    @functools.cached_property
    def config(self) -> Optional[ExperimentConfig]:
        """The experiment; None where there is none that this version reads."""
        path = self.path / "config.json"
        try:
            return from_json(ExperimentConfig, path.read_text(), str(path)).config
        except (RequestError, OSError):
            return None

    def split(self, name: str) -> list[dict[str, Any]]:
        """The rows of one split, by step."""
        return sorted((row for row in self.rows if row["split"] == name), key=lambda row: row["step"])

    def steps(self, folder: str) -> list[int]:
        """The steps of which `folder` ("routing", "passages", "evaluations") has arrays."""
        return sorted(int(path.stem) for path in (self.path / folder).glob("*.npz") if path.stem.isdecimal())

    def arrays(self, folder: str, step: int) -> Arrays:
        """Those of one step."""
        return read_npz(self.path / folder / f"{step}.npz")

    @functools.cached_property
    def routing(self) -> dict[int, Arrays]:
        """Step → arrays of `routing/`, of at most `FRAMES` steps with the first and the last."""
        return {step: self.arrays("routing", step) for step in thinned(self.steps("routing"), FRAMES)}

    @functools.cached_property
    def passages(self) -> Arrays:
        """The last step's decisions on passages; empty when the run recorded none."""
        steps = self.steps("passages")
        return self.arrays("passages", steps[-1]) if steps else {}

    def moe_layers(self) -> list[str]:
        """Layers whose counts per expert are known."""
        last = list(self.routing.values())[-1:]
        return [key.removesuffix("/assigned") for arrays in last for key in arrays if key.endswith("/assigned")]


def read_npz(path: Path) -> Arrays:
    """The arrays of a file. Raises `RequestError` when it is none of a run's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise RequestError(f"{path}: could not be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: not a file of arrays that a run wrote: {error}") from None


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders, named by as much of the path as tells them apart.

    Raises:
      RequestError: one is not the folder of a run, has no metrics yet, or is given twice.
    """
    for path in paths:
        _check(path)
    real = [path.resolve() for path in paths]
    doubled = next((path for place, path in enumerate(real) if path in real[:place]), None)
    if doubled is not None:
        raise RequestError(f"{doubled} is given twice; allowed: each run once")
    return [Run(path, name) for path, name in zip(paths, _names(real), strict=True)]


def _check(path: Path) -> None:
    metrics = path / "metrics.jsonl"
    try:
        if not path.is_dir():
            raise RequestError(f"{path}: not a folder; report needs the folder of a run")
        if not metrics.is_file():
            raise RequestError(f"{path}: not the folder of a run (it has no metrics.jsonl)")
        rows, broken = read_jsonl(metrics)
        if broken and not rows:
            raise RequestError(f"{metrics}: none of its {broken} lines is a row of metrics, with a step and a split")
        if not rows:
            raise RequestError(f"{path}: the run has no metrics yet ({metrics.name} has no row)")
    except OSError as error:
        raise RequestError(f"{path}: could not be read: {error.strerror or error}") from None


def _names(paths: Sequence[Path]) -> list[str]:
    depth = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = [os.sep.join(path.parts[-depth:]) for path in paths]
    return names


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[place] for place in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]
