"""What layers log beside experts: AltUp's streams, token selection and skimming, halting, shortened rows, tables."""

from collections.abc import Sequence

from sparsejax.report import charts
from sparsejax.report.runs import Run, thinned
from sparsejax.report.section import Absent, Section

GROUPS = {
    "altup": "AltUp streams",
    "select": "Token selection",
    "halting": "Halting",
    "sequence": "Shortened rows",
    "memory": "Lookup tables",
    "neurons": "Active neurons",
}
"""The first part of a figure's name in metrics.jsonl → a heading."""


def stream_section(runs: Sequence[Run]) -> Section | Absent:
    """Every figure of these groups over training, a chart each."""
    names, figures = [run.name for run in runs], {}
    rows = []
    for run in runs:
        for row in thinned(run.split("train"), charts.POINTS):
            told = {key.replace("/", "_"): value for key, value in row.items() if _group(key) and _number(value)}
            figures |= {key: None for key in row if key.replace("/", "_") in told}
            if told:
                rows.append({"run": run.name, "step": row["step"]} | told)
    if not rows:
        return Absent(
            "Streams and skipping", "no run logs altup/…, select/…, sequence/…, halting/…, neurons/… or memory/…"
        )
    specs = [
        {**charts.lines("streams", "step", key.replace("/", "_"), names, title=f"{GROUPS[_group(key)]}: {_words(key)}",
                        x_title="step", y_title=_words(key)),
         "transform": [{"filter": f"isValid(datum['{key.replace('/', '_')}'])"}]}
        for key in figures
    ]  # fmt: skip
    return Section("Streams and skipping", "", specs, {"streams": charts.columns(rows)})


def _group(key: str) -> str:
    """The group of a figure of all layers; "" for others."""
    group, _, name = key.partition("/")
    return group if group in GROUPS and name and "/" not in name else ""


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(key: str) -> str:
    return key.partition("/")[2].replace("_", " ")
