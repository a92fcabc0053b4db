"""What is measured of lookup layers: rows of `metrics.jsonl`."""

from collections.abc import Iterator, Mapping
from typing import Optional

import numpy as np

from sparsejax.base.ratios import memory_ratios
from sparsejax.base.reports import MemoryReport, Report
from sparsejax.memory.config import ROW_BYTES, MemorySpec
from sparsejax.model.config import EMBEDDING, ModelConfig
from sparsejax.model.lm import layer_reports
from sparsejax.train.step import TableReport

BANDS = 4
PROBE = 1024
"""Tokens whose addresses are compared from one evaluation to the next."""

Probe = dict[str, np.ndarray]
"""Position/memory → the rows that the first tokens of the evaluation read, int32 `[layers, tokens, K]`."""


def lookups_of(config: ModelConfig, reports: Mapping[str, Report]) -> Iterator[tuple[str, MemorySpec, MemoryReport]]:
    """(layer/memory, its spec, its unstacked host report) of every lookup layer."""
    of_layers = layer_reports(config, reports)
    if EMBEDDING in reports:
        of_layers = {EMBEDDING: reports[EMBEDDING], **of_layers}
    for layer, report in of_layers.items():
        for name, found in report.memory.items():
            yield f"{layer}/{name}", config.memory[name], found


def memory_rows(config: ModelConfig, reports: Mapping[str, Report]) -> list[dict[str, float]]:
    """The `memory/…` metrics of every lookup layer."""
    return [
        memory_ratios(report, spec.address.tables(config.vocab_size), ROW_BYTES * spec.row_width(config))
        for _, spec, report in lookups_of(config, reports)
    ]


def table_row(tables: Mapping[str, TableReport], steps: int) -> dict[str, float]:
    """The metrics of the tables' updates, from sums over so many steps: means over the tables."""
    if not tables:
        return {}
    mean = lambda values: float(np.mean([value / steps for value in values]))  # noqa: E731
    return {
        "memory/rows_updated": mean(table.touched for table in tables.values()),
        "memory/exchange_rounds": mean(table.rounds for table in tables.values()),
    }


def loss_by_frequency(nll_V: np.ndarray, targets_V: np.ndarray) -> dict[str, float]:
    """Mean loss of targets by how frequent their token is in the evaluation: band 1 has the most frequent tokens, and
    each band about a quarter of the targets. A band without targets is left out."""
    order_V = np.argsort(-targets_V, kind="stable")
    before_V = np.cumsum(targets_V[order_V]) - targets_V[order_V]
    band_V = np.minimum(BANDS * before_V / max(targets_V.sum(), 1), BANDS - 1).astype(int)
    found = {}
    for band in range(BANDS):
        ids = order_V[band_V == band]
        if targets_V[ids].sum():
            found[f"memory/loss_band_{band + 1}"] = float(nll_V[ids].sum() / targets_V[ids].sum())
    return found


def probed(reads: Mapping[str, Mapping[str, np.ndarray]]) -> Probe:
    """The probe from a batch's host reads (`EvalReport.reads`)."""
    found = {}
    for position, of_position in reads.items():
        for name, ids in of_position.items():
            by_layer = ids.reshape(-1, ids.shape[-3] * ids.shape[-2], ids.shape[-1])
            found[f"{position}/{name}"] = by_layer[:, :PROBE].astype(np.int32)
    return found


def churn(before: Optional[Probe], now: Probe) -> dict[str, float]:
    """The share of lookups that go to another row than they did an evaluation ago; the mean over layers."""
    if not before or before.keys() != now.keys():
        return {}
    real = {name: (before[name] >= 0) | (ids >= 0) for name, ids in now.items()}
    changed = [np.mean((before[name] != ids)[real[name]]) for name, ids in now.items() if real[name].any()]
    return {"memory/churn": float(np.mean(changed))} if changed else {}
