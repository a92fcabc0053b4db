"""What each run's model costs, from its config alone."""

import html
from collections.abc import Sequence

from sparsejax.base.cost import Cost
from sparsejax.model.cost import TRAINING, component_costs, mean_keys
from sparsejax.report.runs import Run
from sparsejax.report.section import Absent, Section
from sparsejax.report.tables import table
from sparsejax.train.config import ExperimentConfig


def ledger_section(runs: Sequence[Run]) -> Section | Absent:
    """Parameters and forward FLOPs of a token, by component, a table for each run."""
    parts = []
    for run in runs:
        config = run.config
        if config is None:
            parts.append(f"<p>{html.escape(run.name)}: this version cannot read its config.json.</p>")
            continue
        keys = mean_keys(config.model, config.data.sequence_length)
        parts.append(f"<h3>{html.escape(run.name)}</h3>{_ledger(component_costs(config.model), keys, config)}")
    if not any("<table" in part for part in parts):
        return Absent("Ledger", "no run has a config.json that this version reads")
    text = (
        "<p>FLOPs are 2 × the multiply-adds of matrix products of one token's forward pass, every pair processed, a "
        f"row being one document; training costs {TRAINING} × as much. What drops and skips really spared is in the "
        "FLOPs of the metrics.</p>"
    )
    return Section("Ledger", f'{text}<div class="beside">{_each(parts)}</div>')


def _ledger(costs: dict[str, Cost], keys: float, config: ExperimentConfig) -> str:
    length = config.data.sequence_length
    whole = sum(costs.values(), Cost())
    rows = [
        [
            name,
            f"{cost.parameters:,}",
            f"{cost.active:,}",
            f"{cost.flops(keys, length):,.0f}",
            _share(cost, whole, keys, length),
        ]
        for name, cost in costs.items()
    ]
    total = ["total", f"{whole.parameters:,}", f"{whole.active:,}", f"{whole.flops(keys, length):,.0f}", ""]
    bold = [f"<strong>{cell}</strong>" if cell else "" for cell in total]
    return table(["component", "parameters", "active", "FLOPs per token", "share"], [*rows, bold])


def _share(cost: Cost, whole: Cost, keys: float, length: int) -> str:
    return f"{100 * cost.flops(keys, length) / max(whole.flops(keys, length), 1.0):.1f} %"


def _each(parts: Sequence[str]) -> str:
    return "".join(f"<div>{part}</div>" for part in parts)
