"""What models did with the tokens of some rows: churn, specialisation, co-activation, table rows, depths."""

import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsejax.report import charts
from sparsejax.report.runs import FRAMES, Arrays, Run, thinned
from sparsejax.report.section import Absent, Section, Spec, grid
from sparsejax.report.tables import table
from sparsejax.report.words import TokenTexts, token_class

NO_PASSAGES = "no run has passages/STEP.npz, which training writes where config.eval.passages is not 0"
FAVOURITES = 8
"""Tokens of an expert that are named."""
BUCKETS = 16
"""Of positions in a row."""
MOST = 32
"""Experts or rows of one side of a heat map; the busiest are kept."""
EXIT_AT = 0.7
"""Probability at which the histogram of exits lets a token go."""


def layers_with(arrays: Arrays, field: str) -> list[str]:
    """Layers (or layer/memory) that have arrays of this name."""
    return sorted(name.removesuffix(f"/{field}") for name in arrays if name.endswith(f"/{field}"))


def churn_section(runs: Sequence[Run]) -> Section | Absent:
    """The share of tokens whose first expert is not that of the evaluation before."""
    rows = []
    for run in runs:
        for before, step in thinned(list(itertools.pairwise(run.steps("passages"))), FRAMES):
            old, new = run.arrays("passages", before), run.arrays("passages", step)
            for layer in layers_with(new, "experts"):
                if f"{layer}/experts" in old and old[f"{layer}/experts"].shape[:2] == new[f"{layer}/experts"].shape[:2]:
                    first, now = (each[f"{layer}/experts"][..., 0] for each in (old, new))
                    real = (first >= 0) & (now >= 0)
                    share = float((first != now)[real].mean()) if real.any() else None
                    rows.append({"run": run.name, "step": step, "layer": layer, "churn": share})
    if not rows:
        return Absent("Router churn", f"{NO_PASSAGES}; it takes two evaluations of a model with experts")
    names = [run.name for run in runs]
    spec = charts.lines(
        "churn", "step", "churn", names, title="Tokens whose first expert changed", x_title="step",
        y_title="share since the evaluation before", dashed="layer", zero=True,
    )  # fmt: skip
    return Section("Router churn", "", [spec], {"churn": charts.columns(rows)})


def position_section(runs: Sequence[Run]) -> Section | Absent:
    """The share of pairs without a slot by the place of their token in its row."""
    rows = []
    for run in runs:
        arrays = run.passages
        for layer in layers_with(arrays, "experts"):
            chosen = arrays[f"{layer}/experts"] >= 0
            lost = chosen & ~arrays[f"{layer}/processed"]
            for places in np.array_split(np.arange(chosen.shape[1]), min(BUCKETS, chosen.shape[1])):
                asked = chosen[:, places].sum()
                if asked:
                    share = float(lost[:, places].sum() / asked)
                    rows.append({"run": run.name, "layer": layer, "position": int(places[0]), "dropped": share})
    if not rows:
        return Absent("Drops by position", f"{NO_PASSAGES}, for models whose tokens choose experts")
    names = [run.name for run in runs]
    spec = charts.lines(
        "positions", "position", "dropped", names, title="Dropped pairs by position in the row, a dash a layer",
        x_title="position", y_title="share of the pairs there", dashed="layer", zero=True,
    )  # fmt: skip
    return Section("Drops by position", "", [spec], {"positions": charts.columns(rows)})


def specialisation_section(runs: Sequence[Run]) -> Section | Absent:
    """Which tokens, classes of them and packages of the corpus each expert serves, and which experts go together."""
    specs: list[Spec] = []
    parts: list[str] = []
    data: dict[str, Any] = {}
    for number, run in enumerate(runs):
        arrays, texts = run.passages, TokenTexts(run)
        for place, layer in enumerate(layers_with(arrays, "experts")):
            at = f"{number}_{place}"
            experts, real = arrays[f"{layer}/experts"], arrays["segments"] > 0
            shown = _busiest(experts[real])
            if not shown.size:
                continue
            kinds = np.array([token_class(texts[token]) for token in arrays["tokens"][real]])
            title = f"{run.name} · {layer}"
            parts.append(f"<h3>{html.escape(title)}: tokens that each expert serves most</h3>")
            parts.append(_favourites(experts[real], shown, arrays["tokens"][real], texts))
            specs.append(_served(data, f"classes{at}", experts[real], shown, kinds, f"{title}: token classes"))
            if "source" in arrays:
                names = np.append(arrays["source_names"], "?")[arrays["source"][real]]
                if len(set(names)) > 1:
                    specs.append(_served(data, f"sources{at}", experts[real], shown, names, f"{title}: packages"))
            if experts.shape[-1] > 1:
                specs.append(_together(data, f"pairs{at}", experts[real], shown, f"{title}: serving a token together"))
    if not specs:
        return Absent("Specialisation", f"{NO_PASSAGES}, for models whose tokens choose experts")
    text = (
        "<p>On the passages of the last evaluation. Lift is how much oftener an expert serves such tokens than it "
        "would if it served all alike: 1 is no preference. Together: pairs of experts over what independent choices of "
        "the same loads would give.</p>"
    )
    return Section("Specialisation", text + "".join(parts), specs, data)


def _favourites(experts_NK: np.ndarray, shown: np.ndarray, tokens_N: np.ndarray, texts: TokenTexts) -> str:
    """A table: expert, and the tokens that it serves oftenest with the share of its pairs."""
    rows = []
    for expert in shown.tolist():
        served = tokens_N[(experts_NK == expert).any(-1)]
        numbers, counts = np.unique(served, return_counts=True)
        best = np.argsort(-counts, kind="stable")[:FAVOURITES]
        name = lambda at: html.escape(repr(texts[int(numbers[at])])[1:-1])  # noqa: E731
        words = [f"<code>{name(at)}</code> {counts[at] / served.size:.0%}" for at in best]
        rows.append([str(expert), f"{served.size}", " ".join(words)])
    return f"<details><summary>{len(rows)} experts</summary>{table(['expert', 'served', 'tokens'], rows, 9)}</details>"


def _busiest(experts_NK: np.ndarray) -> np.ndarray:
    """The experts that serve most tokens, in their order."""
    chosen = experts_NK[experts_NK >= 0]
    numbers, counts = np.unique(chosen, return_counts=True)
    return np.sort(numbers[np.argsort(-counts, kind="stable")[:MOST]])


def _served(data: dict[str, Any], name: str, experts_NK: Any, shown: Any, of: np.ndarray, title: str) -> Spec:
    """A heat map expert × class of lifts."""
    classes = sorted(set(of.tolist()), key=lambda each: (-(of == each).sum(), each))[:MOST]
    any_NE = (experts_NK[:, :, None] == shown).any(1)
    values: list[Any] = []
    for each in classes:
        mine, all_E = any_NE[of == each].mean(0), any_NE.mean(0)
        values += [charts.short(float(f"{lift:.2f}")) for lift in mine / np.maximum(all_E, 1e-9)]
    data[name] = grid({"class": classes, "expert": shown.tolist()}, "lift", values)
    return charts.heat_map(
        name, "expert", "class", "lift", title=title, legend="lift", domain=(0, 3), x_title="expert"
    )  # fmt: skip


def _together(data: dict[str, Any], name: str, experts_NK: Any, shown: Any, title: str) -> Spec:
    """A heat map expert × expert: how often both serve a token, over what independence would give."""
    any_NE = (experts_NK[:, :, None] == shown).any(1).astype(np.float64)
    both_EE, each_E = any_NE.T @ any_NE / len(any_NE), any_NE.mean(0)
    ratio_EE = both_EE / np.maximum(each_E[:, None] * each_E, 1e-12)
    off = ~np.eye(len(shown), dtype=bool)
    values = [charts.short(float(f"{v:.2f}")) if keep else None for v, keep in zip(ratio_EE.ravel(), off.ravel())]
    names = shown.tolist()
    data[name] = grid({"with": names, "expert": names}, "ratio", values)
    return charts.heat_map(
        name, "expert", "with", "ratio", title=title, legend="together", domain=(0, 3), x_title="expert", y_title="with"
    )  # fmt: skip


def table_section(runs: Sequence[Run]) -> Section | Absent:
    """How many rows of its tables a model touches, and how evenly: entropy of the rows read, over that of one token a
    row."""
    rows = []
    for run in runs:
        for step in thinned(run.steps("passages"), FRAMES):
            arrays = run.arrays("passages", step)
            for layer in layers_with(arrays, "rows"):
                read = arrays[f"{layer}/rows"]
                read = read[read >= 0]
                if read.size:
                    counts = np.unique(read, return_counts=True)[1]
                    share = counts / counts.sum()
                    entropy = float(-(share * np.log(share)).sum())
                    base = {"run": run.name, "step": step, "table": layer, "rows": len(counts)}
                    rows.append(base | {"entropy": entropy / max(np.log(read.size), 1e-9)})
    if not rows:
        return Absent("Tables", f"{NO_PASSAGES}, for models with lookup tables")
    names = [run.name for run in runs]
    forms = (("rows", "Rows that the passages read", "rows"), ("entropy", "Bucket entropy", "share of log reads"))
    specs: list[Spec] = [
        charts.lines("tables", "step", key, names, title=title, x_title="step", y_title=unit, dashed="table", zero=True)
        for key, title, unit in forms
    ]
    return Section("Tables", "", specs, {"tables": charts.columns(rows)})


def depth_section(runs: Sequence[Run]) -> Section | Absent:
    """How deep tokens go: skipped layers, halting, exits."""
    skipped, depths = [], []
    for run in runs:
        arrays = run.passages
        if not arrays:
            continue
        real = arrays["segments"] > 0
        for layer in layers_with(arrays, "kept"):
            skipped.append({"run": run.name, "layer": layer, "kept": float(arrays[f"{layer}/kept"][real].mean())})
        for kind, values in _depths(arrays, real):
            numbers, counts = np.unique(values, return_counts=True)
            shares = counts / counts.sum()
            depths += [
                {"run": f"{run.name} · {kind}", "depth": int(number), "share": float(share)}
                for number, share in zip(numbers, shares)
            ]
    specs: list[Spec] = []
    data: dict[str, Any] = {}
    if skipped:
        data["kept"] = charts.columns(skipped)
        specs.append(
            charts.bars(
                "kept", "layer", "kept", [run.name for run in runs], title="Tokens that layers compute on",
                x_title="layer", y_title="share",
            )
        )  # fmt: skip
    if depths:
        data["depths"] = charts.columns(depths)
        names = list(dict.fromkeys(row["run"] for row in depths))
        specs.append(
            charts.bars("depths", "depth", "share", names, title="Depths", x_title="layers", y_title="share of tokens")
        )
    losses = [
        {"run": run.name, "depth": int(layer), "loss": float(np.nanmean(nats))}
        for run in runs
        if "exit/nats" in run.passages
        for layer, nats in zip(run.passages["exit/layers"], np.moveaxis(run.passages["exit/nats"], -1, 0))
    ]
    if losses:
        data["exits"] = charts.columns(losses)
        names = [run.name for run in runs]
        specs.append(
            charts.bars("exits", "depth", "loss", names, title="Loss of every exit", x_title="layers", y_title="nats")
        )
    if not specs:
        return Absent("Depth", f"{NO_PASSAGES}, for models that skip, halt or exit")
    text = f"<p>Exits: the first whose likeliest token has a probability of {EXIT_AT} or more.</p>"
    return Section("Depth", text if any("exit" in row["run"] for row in depths) else "", specs, data)


def _depths(arrays: Arrays, real: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(what, layers that each token took)."""
    if "halting/steps" in arrays:
        yield "halting", arrays["halting/steps"][real]
    if "exit/top" in arrays:
        told = np.isfinite(arrays["exit/top"][..., -1])
        yield f"exit at {EXIT_AT}", exit_depths(arrays)[told & real]
    kept = layers_with(arrays, "kept")
    if kept:
        yield "layers that may be skipped, computed", sum(arrays[f"{layer}/kept"].astype(int) for layer in kept)[real]


def exit_depths(arrays: Arrays) -> np.ndarray:
    """After how many layers each token would leave, `[P, T]`."""
    sure = np.nan_to_num(arrays["exit/top"]) >= EXIT_AT
    sure[..., -1] = True
    return np.asarray(arrays["exit/layers"])[sure.argmax(-1)]
