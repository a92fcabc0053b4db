"""Who was chosen how often: load of layer × expert × time, balance, drops, dead experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsejax.report import charts
from sparsejax.report.runs import FRAMES, Run, thinned
from sparsejax.report.section import Absent, Section, Spec, grid

CELLS = 60_000
"""Of one heat map: what a browser still slides through, and a few hundred kilobytes."""
MOST_EXPERTS = 256
DEAD = 0.01
"""A share of the mean load, as in `moe/dead_experts`."""

NO_EXPERTS = "no run has routing/STEP.npz, which training writes for models with a mixture-of-experts block"


def load_section(runs: Sequence[Run]) -> Section | Absent:
    """The heat maps, one for each run."""
    specs, data = [], {}
    for number, run in enumerate(runs):
        if run.moe_layers():
            name = f"loads{number}"
            data[name], steps = _relative(run)
            specs.append(
                charts.heat_map(
                    name, "expert", "layer", "load", title=run.name, legend="load / mean", domain=(0, 2),
                    slider=steps, x_title="expert",
                )
            )  # fmt: skip
    if not specs:
        return Absent("Expert load", NO_EXPERTS)
    text = (
        "<p>Pairs that the router assigned, before capacity, over the mean of the layer. The slider moves in time; "
        "1 is an even share, and twice that or more looks alike.</p>"
    )
    return Section("Expert load", text, specs, data)


def _relative(run: Run) -> tuple[dict[str, Any], list[int]]:
    """The data set of load / mean, and the steps of its frames."""
    layers = run.moe_layers()
    most = max(len(arrays[f"{layer}/assigned"]) for arrays in run.routing.values() for layer in layers)
    width = min(most, MOST_EXPERTS)
    steps = thinned(list(run.routing), max(2, min(FRAMES, CELLS // (width * len(layers)))))
    values: list[float | None] = []
    for step in steps:
        for layer in layers:
            load = relative_load(run.routing[step][f"{layer}/assigned"])
            kept = load[_shown(len(load))]
            values += [charts.short(float(f"{value:.2f}")) for value in kept] + [None] * (width - len(kept))
    axes = {"frame": list(range(len(steps))), "layer": layers, "expert": _shown(most).tolist()}
    return grid(axes, "load", values) | {"join": {"frame": {"step": steps}}}, steps


def relative_load(assigned_E: np.ndarray) -> np.ndarray:
    """Load over mean load; ones when there was none."""
    load = np.asarray(assigned_E, np.float64)
    return load / load.mean() if load.sum() else np.ones_like(load)


def _shown(experts: int) -> np.ndarray:
    """The experts that have a cell: all, or evenly spread ones of very many."""
    return np.unique(np.linspace(0, experts - 1, min(experts, MOST_EXPERTS)).round().astype(int))


def balance_section(runs: Sequence[Run]) -> Section | Absent:
    """MaxVio against its sampling floor, entropy, dead experts, over training."""
    rows = []
    for run in runs:
        for row in thinned([row for row in run.split("train") if "moe/load_max_over_mean" in row], charts.POINTS):
            base = {"run": run.name, "step": row["step"]}
            for kind, key in (("measured", "moe/load_max_over_mean"), ("of random routing", "moe/balance_floor")):
                if row.get(key) is not None:
                    rows.append(base | {"of": kind, "maxvio": row[key] - 1})
            more = {
                key: row.get(f"moe/{key}") for key in ("router_entropy", "dead_experts", "balance_loss", "router_z")
            }
            rows.append(base | more)
    if not rows:
        return Absent("Balance", "no row of metrics has moe/…, which models with a mixture-of-experts block log")
    names = [run.name for run in runs]
    forms = (
        ("maxvio", "MaxVio, and its sampling floor (dashed)", "largest load / mean − 1", "of"),
        ("router_entropy", "Router entropy", "share of log E", None),
        ("dead_experts", "Dead experts, all layers", "experts", None),
        ("balance_loss", "Balance loss", "1 is balanced", None),
        ("router_z", "Router logits", "mean of logsumexp²", None),
    )
    specs: list[Spec] = [
        {**charts.lines("balance", "step", key, names, title=title, x_title="step", y_title=unit, dashed=dashed,
                        zero=key in ("maxvio", "dead_experts")),
         "transform": [{"filter": f"isValid(datum.{key})"}]}
        for key, title, unit, dashed in forms
    ]  # fmt: skip
    data: dict[str, Any] = {"balance": charts.columns(rows)}
    return Section("Balance", _floor_note(), [*specs, *_dead_lines(runs, data)], data)


def _floor_note() -> str:
    return (
        "<p>The floor is the MaxVio that uniformly random routing of as many tokens would show: "
        "what lies on it cannot be balanced better.</p>"
    )


def _dead_lines(runs: Sequence[Run], data: dict[str, Any]) -> list[Spec]:
    """When each expert that ever had nearly no load had none: a mark for every window, by run."""
    specs = []
    for number, run in enumerate(runs):
        rows = [
            {"step": step, "expert": f"{layer} · {expert}", "share": float(load[expert])}
            for step, arrays in run.routing.items()
            for layer in run.moe_layers()
            for load in [relative_load(arrays[f"{layer}/assigned"])]
            for expert in np.flatnonzero(load < DEAD)
        ]
        often = sorted({row["expert"] for row in rows}, key=lambda name: -sum(row["expert"] == name for row in rows))
        kept = [row for row in rows if row["expert"] in often[:40]]
        if kept:
            name = f"dead{number}"
            data[name] = charts.columns(kept)
            title = f"{run.name}: windows in which experts were dead" + (
                f" (the 40 deadest of {len(often)})" if len(often) > 40 else ""
            )
            specs.append(charts.marks(name, "step", "expert", title=title, steps=list(run.routing)))
    return specs


def drop_section(runs: Sequence[Run]) -> Section | Absent:
    """Dropped pairs over training, and by layer and cause in the last window."""
    rows, causes = [], []
    for run in runs:
        for row in thinned([row for row in run.split("train") if "moe/drop_fraction" in row], charts.POINTS):
            kept = {key: row.get(f"moe/{key}") for key in ("drop_fraction", "unserved_fraction", "slot_utilisation")}
            rows.append({"run": run.name, "step": row["step"]} | kept)
        for arrays in list(run.routing.values())[-1:]:
            for layer in run.moe_layers():
                assigned = max(float(arrays[f"{layer}/assigned"].sum()), 1.0)
                for key, cause in CAUSES.items():
                    if f"{layer}/{key}" in arrays:
                        share = float(arrays[f"{layer}/{key}"].sum()) / assigned
                        causes.append({"run": run.name, "layer": layer, "cause": cause, "share": share})
    if not rows:
        return Absent("Drops", "no row of metrics has moe/drop_fraction, which mixture-of-experts blocks log")
    names = [run.name for run in runs]
    specs: list[Spec] = [
        charts.lines("drops", "step", key, names, title=title, x_title="step", y_title=unit, zero=True)
        for key, title, unit in (
            ("drop_fraction", "Dropped pairs", "share of assigned pairs"),
            ("unserved_fraction", "Tokens that no expert served", "share of tokens"),
            ("slot_utilisation", "Slots in use", "processed / slots"),
        )
    ]
    data: dict[str, Any] = {"drops": charts.columns(rows)}
    if causes:
        data["causes"] = charts.columns(causes)
        specs.append(charts.stacked("causes", "layer", "share", "cause", title="Drops by layer and cause, last window",
                                    x_title="layer", y_title="share of assigned pairs"))  # fmt: skip
    return Section("Drops", "", specs, data)


CAUSES = {"dropped_capacity": "expert full", "exchange/dropped": "buffer of the device full"}
