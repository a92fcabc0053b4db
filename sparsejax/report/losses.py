"""Loss against what was spent: tokens, FLOPs, time."""

import html
from collections.abc import Sequence
from typing import Any

from sparsejax.report import charts
from sparsejax.report.runs import Run, thinned
from sparsejax.report.section import Section
from sparsejax.report.tables import table

SPENT = {
    "tokens": "tokens seen",
    "flops": "training FLOPs (ideal)",
    "seconds": "seconds",
}


def loss_section(runs: Sequence[Run]) -> Section:
    """Cross entropy of both splits, and a table of what each run came to."""
    names = [run.name for run in runs]
    rows: list[dict[str, Any]] = []
    for run in runs:
        for split in ("train", "eval"):
            for row in thinned(run.split(split), charts.POINTS):
                kept = {key: row.get(key) for key in (*SPENT, "step", "cross_entropy", "learning_rate", "grad_norm")}
                rows.append({"run": run.name, "split": split} | kept)
    specs = [
        charts.lines(
            "losses", key, "cross_entropy", names, title=f"Loss against {key} (training dashed)", x_title=title,
            y_title="cross entropy, nats per token", dashed="split",
        )
        for key, title in SPENT.items()
        if any(row[key] is not None for row in rows)
    ]  # fmt: skip
    specs.append(
        charts.lines("losses", "step", "grad_norm", names, title="Gradient norm", x_title="step", y_title="norm")
        | {"transform": [{"filter": "datum.split === 'train'"}]}
    )
    return Section("Loss", _last(runs), specs, {"losses": charts.columns(rows)})


def _last(runs: Sequence[Run]) -> str:
    """The newest figures of every run."""
    cells = []
    for run in runs:
        found: dict[str, Any] = {}
        for split in ("train", "eval"):
            last = run.split(split)[-1:]
            found |= {f"{split} {key}": row.get(key) for row in last for key in ("cross_entropy", "bits_per_byte")}
            found |= {key: row.get(key) for row in last for key in ("step", "tokens", "flops", "seconds")}
        speed = [row.get("tokens_per_second") for row in run.split("train")]
        cells.append([html.escape(run.name), *map(_figure, (
            found.get("step"), found.get("tokens"), found.get("flops"), found.get("seconds"),
            next((value for value in reversed(speed) if value is not None), None),
            found.get("train cross_entropy"), found.get("eval cross_entropy"), found.get("eval bits_per_byte"),
        ))])  # fmt: skip
    titles = ["run", "step", "tokens", "FLOPs", "seconds", "tokens/s", "train loss", "validation loss", "bits per byte"]
    return table(titles, cells)


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
