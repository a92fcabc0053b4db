"""Alerts of a run as it goes, and of one that is read from its folder: the rules of `base.alerts`, and those that know
the model's config."""

import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from sparsejax.base.alerts import WINDOWS, Alert, History, Seen, alerts
from sparsejax.base.ratios import collapsed
from sparsejax.base.writers import read_jsonl
from sparsejax.model.config import ModelConfig


class Watch:
    """Looks at window after window. What is wrong is told when it begins, and again when it comes back."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._history: deque[Seen] = deque(maxlen=WINDOWS)
        self._told: set[tuple[str, str]] = set()

    def resume(self, workdir: Path, step: int) -> None:
        """Goes on after `step` with the windows that the run has written; one that cannot be read is left out."""
        path = workdir / "metrics.jsonl"
        rows = read_jsonl(path)[0] if path.is_file() else []
        before = [row for row in rows if row["split"] == "train" and row["step"] <= step]
        for row in before[-WINDOWS:]:
            self(row, _arrays(workdir / "routing" / f"{row['step']}.npz"))

    def __call__(self, row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Alert]:
        """The alerts that are new in this window."""
        self._history.append(Seen(row, arrays))
        found = found_in(list(self._history), self.config)
        new = [alert for alert in found if alert.about not in self._told]
        self._told = {alert.about for alert in found}
        return new


def found_in(history: History, config: Optional[ModelConfig]) -> list[Alert]:
    """What is wrong at the newest window; without a config, only what shows without one."""
    return alerts(history) + ([] if config is None or not history else collapsed_tables(history[-1], config))


def collapsed_tables(seen: Seen, config: ModelConfig) -> list[Alert]:
    """Lookup layers whose tokens share too few buckets."""
    found = []
    for key, loads in seen.arrays.items():
        where, _, field = key.rpartition("/")
        name = where.rpartition("/")[2]
        if field != "loads" or name not in config.memory:
            continue
        address = config.memory[name].address
        floor = address.collapse
        share = None if floor is None else collapsed(loads, address.tables(config.vocab_size), floor)
        if share is not None:
            text = f"its bucket entropy is {share:.2f} of what is possible (under {floor:g})"
            cause = "states that lie close together, so that their addresses do, too"
            remedy = f"to {address.remedy} (model.memory.{name})"
            found.append(Alert("addresses collapse", where, int(seen.row["step"]), text, cause, remedy))
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
