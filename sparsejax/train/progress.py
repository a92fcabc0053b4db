"""The live display of a run: a bar on a terminal, aligned lines in a file or a pipe."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Column(NamedTuple):
    """One figure of a row."""

    title: str
    key: str  # in the metrics row
    width: int
    form: Callable[[Any], str]


COLUMNS = (
    Column("loss", "loss", 8, "{:.4f}".format),
    Column("accuracy %", "accuracy", 10, lambda fraction: f"{100 * fraction:.2f}"),
    Column("bits/byte", "bits_per_byte", 9, "{:.4f}".format),
    Column("tokens/s", "tokens_per_second", 10, "{:,.0f}".format),
    Column("drop %", "moe/drop_fraction", 7, lambda fraction: f"{100 * fraction:.2f}"),
    Column("load max/mean", "moe/load_max_over_mean", 13, "{:.2f}".format),
)
SPLIT_WIDTH, ETA_WIDTH = 5, 8


class Display:
    """Shows the rows of a run. `start`, then `update` and `note` as things happen, then `close`."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._bar: Progress | None = None
        self._total = 0

    def start(self, total: int, first_step: int = 0) -> None:
        """A run of `total` steps begins, after `first_step` of them were done before."""
        self._total = total
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(file=self._stream),
            )
            self._bar.add_task("train", total=total, completed=first_step, figures="compiling")
            self._bar.start()
        else:
            titles = [f"{column.title:>{column.width}}" for column in COLUMNS]
            cells = [" " * SPLIT_WIDTH, f"{'step':>{self._step_width}}", *titles, f"{'ETA':>{ETA_WIDTH}}"]
            self._print("  ".join(cells))

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics; what it lacks is shown as '-'."""
        eta = remaining(row, self._total)
        if self._bar is None:
            step = f"{row['step']}/{self._total}"
            figures = [f"{figure(column, row):>{column.width}}" for column in COLUMNS]
            cells = [f"{row['split']:<{SPLIT_WIDTH}}", f"{step:>{self._step_width}}", *figures, f"{eta:>{ETA_WIDTH}}"]
            self._print("  ".join(cells))
            return
        text = " · ".join(f"{column.title} {figure(column, row)}" for column in COLUMNS)
        if row["split"] == "train":
            self._bar.update(self._bar.task_ids[0], completed=row["step"], figures=f"{text} · ETA {eta}")
        else:
            self.note(f"{row['split']} at step {row['step']}: {text}")

    def note(self, text: str) -> None:
        """Shows a line of text above the bar, or between the lines."""
        if self._bar is None:
            self._print(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _step_width(self) -> int:
        return 2 * len(str(self._total)) + 1

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def figure(column: Column, row: Mapping[str, Any]) -> str:
    """The row's value in this column as text, '-' when it has none."""
    value = row.get(column.key)
    return "-" if value is None else column.form(value)


def remaining(row: Mapping[str, Any], total: int) -> str:
    """The time for the rest of the run at the row's `step_seconds`, as h:mm:ss; '-' when it does not say."""
    seconds = row.get("step_seconds")
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds * max(0, total - row["step"])), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
