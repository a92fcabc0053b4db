"""Rows of `metrics.jsonl`: sums of a window of steps, divided once."""

import math
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.base.ratios import (
    halting_ratios,
    heavy_ratios,
    over_layers,
    selection_ratios,
    sequence_ratios,
    skim_ratios,
    stream_ratios,
)
from sparsejax.base.reports import Report, add, to_host
from sparsejax.blocks.context import Mode, Totals
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import TRAINING, forward_flops, layer_costs, spared_work
from sparsejax.model.lm import auxiliary_losses, layer_reports, moe_layers, settle
from sparsejax.train.memory_metrics import lookups_of, loss_by_frequency, memory_rows, table_row
from sparsejax.train.step import EvalReport, ExitSums, StepReport, TableReport

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Window:
    """The reports of the steps since the last row, summed on the host in int64 and float64."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.steps = 0  # since the last row
        self.last: Optional[StepReport] = None
        self._sums: Optional[tuple[dict[str, Report], dict[str, TableReport]]] = None
        self._carried: list[Any] = []  # sums of the process that took the checkpoint, as JSON

    def add(self, report: StepReport) -> tuple[int, float]:
        """Takes one step's report, waiting for it. Returns its (tokens, ideal training FLOPs)."""
        last: StepReport = to_host(report)
        sums = (last.reports, last.tables)
        sums = sums if self._sums is None else add(self._sums, sums)
        if self._carried:
            leaves, structure = jax.tree.flatten(sums)
            before = [np.asarray(values, leaf.dtype) for values, leaf in zip(self._carried, leaves, strict=True)]
            sums, self._carried = add(structure.unflatten(before), sums), []
        self.last, self._sums, self.steps = last, sums, self.steps + 1
        pairs = processed_flops(self.config, last.reports)
        passes = float(last.passes)
        forward = forward_flops(
            self.config, passes * float(last.tokens), passes * float(last.keys), pairs, passes * float(last.rows)
        )
        spared = spared_flops(self.config, last.reports, passes * float(last.keys))
        return int(last.tokens), TRAINING * (forward - spared)

    def saved(self) -> dict[str, Any]:
        """The window as JSON values, for a checkpoint that falls between two rows."""
        return {"steps": self.steps, "sums": [leaf.tolist() for leaf in jax.tree.leaves(self._sums)]}

    def resume(self, saved: dict[str, Any]) -> None:
        """Goes on with a window that was `saved`."""
        self.steps, self._carried = saved["steps"], saved["sums"]

    def take(self) -> tuple[Row, Arrays]:
        """(metrics of the window, its routing arrays), and begins a new one. Losses and norms are those of its last
        step."""
        assert self.last is not None and self._sums is not None
        last, (reports, tables), steps = self.last, self._sums, self.steps
        self._sums, self.steps = None, 0
        targets = max(float(last.targets), 1.0)
        row: Row = {
            "loss": float(last.loss),
            "cross_entropy": float(last.cross_entropy),
            "accuracy": float(last.correct) / (targets * float(last.passes)),
            "grad_norm": float(last.grad_norm),
            "window_steps": steps,
        }
        row |= {f"loss/{name}": float(value) for name, value in last.terms.items()}
        row |= exit_row(self.config, last.exits, targets)
        row |= layer_metrics(self.config, reports, "train") | table_row(tables, steps)
        return row, routing_arrays(self.config, reports)


def eval_row(config: ModelConfig, total: EvalReport) -> tuple[Row, Arrays]:
    """The metrics of a whole evaluation pass from its summed host report. The auxiliary losses are those of the pass
    as one batch."""
    reports = settle(config, total.reports)
    targets = max(float(total.targets), 1.0)
    cross_entropy = float(total.cross_entropy_sum) / targets
    totals = Totals(
        targets=jnp.asarray(targets),
        tokens=jnp.asarray(float(total.tokens)),
        rows=jnp.asarray(float(total.rows)),
        microbatches=1,
    )
    terms = auxiliary_losses(config, reports, totals)
    row: Row = {"loss": cross_entropy + sum(float(v) for v in terms.values()), "cross_entropy": cross_entropy}
    row |= {"accuracy": float(total.correct) / targets}
    row |= {f"loss/{name}": float(value) for name, value in terms.items()}
    row |= {"targets": int(total.targets)}
    row |= exit_row(config, total.exits, targets)
    row |= {} if total.by_token is None else loss_by_frequency(*map(np.asarray, total.by_token))
    return row | layer_metrics(config, reports, "eval"), routing_arrays(config, reports)


def exit_row(config: ModelConfig, exits: ExitSums, targets: float) -> Row:
    """Of the exits but the last, by their depth; means over so many targets."""
    row: Row = {}
    for depth, lost, right in zip(config.exits.depths, exits.cross_entropy, exits.correct, strict=True):
        row |= {
            f"exit/{depth:02d}/cross_entropy": float(lost) / targets,
            f"exit/{depth:02d}/accuracy": float(right) / targets,
        }
    return row


def bits_per_byte(cross_entropy: float) -> float:
    """Nats per token → bits per byte, for byte tokens."""
    return cross_entropy / math.log(2)


def layer_metrics(config: ModelConfig, reports: dict[str, Report], mode: Mode) -> Row:
    """The scalars that conditional layers report, over all layers."""
    layers = layer_reports(config, reports)
    of_blocks = [_of_layer(config, layer.block, layers[layer.name], mode) for layer in config.layers]
    halting = [report.halting for report in layers.values() if report.halting is not None]
    return over_layers(of_blocks + memory_rows(config, reports)) | halting_ratios(halting)


def _of_layer(config: ModelConfig, block: str, report: Report, mode: Mode) -> dict[str, float]:
    of_streams = {} if report.streams is None else stream_ratios(report.streams)
    of_skim = {} if report.skim is None else skim_ratios(report.skim)
    of_sequence = {} if report.sequence is None else sequence_ratios(report.sequence)
    of_selection = {} if report.selection is None else selection_ratios(report.selection)
    of_heavy = {} if report.heavy is None else heavy_ratios(report.heavy)
    of_tokens = of_sequence | of_selection | of_heavy | of_skim
    return config.blocks[block].metrics(report, mode) | of_streams | of_tokens


def routing_arrays(config: ModelConfig, reports: dict[str, Report]) -> Arrays:
    """What `routing/STEP.npz` holds: for every MoE layer, `LAYER/FIELD`, FIELD being those of `MoEReport` (one in a
    part of it as `PART/FIELD`) and `dropped`; for every lookup layer, `LAYER/MEMORY/loads`; for every layer that tokens
    leave or halt after, `LAYER/kept` or `LAYER/halting`, and `LAYER/tokens`."""
    arrays: Arrays = {}
    for name, report in layer_reports(config, reports).items():
        if report.skim is not None:
            arrays |= {f"{name}/{field}": np.asarray(getattr(report.skim, field)) for field in ("kept", "tokens")}
        if report.halting is not None:
            arrays |= {f"{name}/{field}": np.asarray(getattr(report.halting, field)) for field in ("halting", "tokens")}
    for name, report in moe_layers(config, reports).items():
        arrays[f"{name}/dropped"] = np.asarray(report.dropped)
        for path, value in jax.tree_util.tree_leaves_with_path(report):
            arrays[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(value)
    return arrays | {f"{where}/loads": np.asarray(report.loads) for where, _, report in lookups_of(config, reports)}


def spared_flops(config: ModelConfig, reports: dict[str, Report], keys: float) -> float:
    """Forward FLOPs that layers were spared because tokens had left or halted, of passes with so many pairs in each
    layer."""
    saved = 0.0
    for layer, report in zip(config.layers, layer_reports(config, reports).values(), strict=True):
        if report.skim is not None:
            found, work = report.skim, spared_work(config, layer.block)
            saved += (found.tokens - found.attended) * work.before + (found.tokens - found.left) * work.after
            saved += (keys - float(found.keys)) * work.pair
        if report.selection is not None and report.selection.keys is not None:
            found, costs = report.selection, layer_costs(config, layer.block)
            names = ("attention_projections", *config.blocks[layer.block].costs(config))
            saved += (found.tokens - found.chosen) * sum(costs[name].per_token for name in names)
            saved += (keys - float(report.selection.keys)) * costs["attention_scores"].per_key
        if report.halting is not None:
            found, costs = report.halting, layer_costs(config, layer.block)
            of_token = sum(cost.per_token for cost in costs.values()) - config.halting.halted_flops(config)
            saved += (found.tokens - found.running) * of_token
            saved += (keys - float(found.keys)) * costs["attention_scores"].per_key
    return float(saved)


def processed_flops(config: ModelConfig, reports: dict[str, Report]) -> float:
    """Forward FLOPs of the pairs that experts really processed, over all layers."""
    layers = layer_reports(config, reports)
    return sum(config.blocks[layer.block].processed_flops(layers[layer.name], config) for layer in config.layers)
