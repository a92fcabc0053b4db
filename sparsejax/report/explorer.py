"""The token explorer: passages of validation text, every token coloured by what the model did with it."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsejax.report.charts import short
from sparsejax.report.passages import EXIT_AT, NO_PASSAGES, exit_depths, layers_with
from sparsejax.report.runs import Arrays, Run
from sparsejax.report.section import Absent, Section
from sparsejax.report.words import TokenTexts

TOKENS = 3000
"""Of a run that the page holds: what a reader looks at, and a browser still lays out at once."""

HTML = """<p>Hover over a token, or touch it, for its numbers. A token that one of its experts had no slot for is
underlined.</p>
<div class="controls"><label>Colour by <select id="explorer-view"></select></label>
<label><input type="checkbox" id="explorer-values"> write the values</label></div>
<p id="explorer-key" class="faint"></p>
<div id="explorer-panes" class="beside"></div>
<p id="explorer-told" class="told" role="status" aria-live="polite"></p>"""


def explorer_section(runs: Sequence[Run]) -> Section | Absent:
    """A pane for each run that has passages; all panes are coloured by the same thing."""
    panes = [_pane(run) for run in runs if run.passages]
    if not panes:
        return Absent("Token explorer", NO_PASSAGES)
    lines = {f"{run.name}: {line}" for run in runs for line in run.passages.get("absent", np.array([])).tolist()}
    more = "".join(f'<p class="faint">{html.escape(line)}</p>' for line in sorted(lines))
    return Section("Token explorer", HTML + more, (), {"explorer": panes})


def _pane(run: Run) -> dict[str, Any]:
    arrays = run.passages
    texts, length = TokenTexts(run), arrays["tokens"].shape[1]
    rows = max(1, min(len(arrays["tokens"]), TOKENS // length))
    arrays = {name: array[:rows] if array.ndim > 1 else array for name, array in arrays.items()}
    real = arrays["segments"] > 0
    return {
        "run": run.name,
        "rows": real.sum(axis=1).tolist(),
        "texts": [texts[token] for token in arrays["tokens"][real]],
        "sources": _sources(arrays, real),
        "views": list(_views(arrays, real)),
    }


def _sources(arrays: Arrays, real: np.ndarray) -> list[str]:
    """Of the first token of every row."""
    if "source" not in arrays:
        return []
    names = [*arrays["source_names"].tolist(), ""]
    return [names[row[keep][0]] if keep.any() else "" for row, keep in zip(arrays["source"], real)]


def _views(arrays: Arrays, real: np.ndarray) -> Iterator[dict[str, Any]]:
    """What tokens can be coloured by: `values` for every token, `kind` number or category; `told`: what hovering says
    in their place; `marked`: tokens to underline."""
    yield _view("loss (nats)", "number", arrays["nats"][real])
    for layer in layers_with(arrays, "experts"):
        experts, weights = arrays[f"{layer}/experts"][real], arrays[f"{layer}/weights"][real]
        kept = arrays[f"{layer}/processed"][real]
        told = [
            ", ".join(
                f"{expert} ({weight:.2f}{'' if there else ', dropped'})"
                for expert, weight, there in zip(*each)
                if expert >= 0
            )
            or "none"
            for each in zip(experts, weights, kept)
        ]
        lost = (~kept & (experts >= 0)).any(-1)
        yield _view(f"{layer}: expert", "category", experts[:, 0], told, np.flatnonzero(lost))
    for layer in layers_with(arrays, "kept"):
        kept = arrays[f"{layer}/kept"][real]
        yield _view(f"{layer}: computed", "category", kept.astype(int), ["computed" if k else "skipped" for k in kept])
    for layer in layers_with(arrays, "rows"):
        rows = arrays[f"{layer}/rows"][real]
        yield _view(f"{layer}: row", "category", rows[:, 0], [", ".join(map(str, each)) for each in rows])
    if "halting/steps" in arrays:
        yield _view("layers until halting", "number", arrays["halting/steps"][real])
    if "exit/top" in arrays:
        layers = arrays["exit/layers"].tolist()
        told = [
            ", ".join(f"{layer}: {p:.2f}" for layer, p in zip(layers, each)) if np.isfinite(each[-1]) else "no target"
            for each in arrays["exit/top"][real]
        ]
        left = np.where(np.isfinite(arrays["exit/top"][..., -1]), exit_depths(arrays), np.nan)
        yield _view(f"exit at {EXIT_AT}", "number", left[real], told)


def _view(name: str, kind: str, values: Any, told: Any = None, marked: Any = ()) -> dict[str, Any]:
    found = {"name": name, "kind": kind, "values": [short(value) for value in np.asarray(values)]}
    return found | ({"told": told} if told else {}) | ({"marked": [int(m) for m in marked]} if len(marked) else {})
