"""The ratios that are drawn from host reports, at the very end, by the names of their metrics."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np

from sparsejax.base.reports import (
    HaltingReport,
    HeavyReport,
    MemoryReport,
    MoEReport,
    NeuronReport,
    SelectionReport,
    SequenceReport,
    SkimReport,
    StreamReport,
)


def over_layers(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of layers as those of the model: the plain mean over the layers that have one; dead experts are
    summed."""
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: float(sum(v) if key == "moe/dead_experts" else np.mean(v)) for key, v in values.items()}


def stream_ratios(report: StreamReport) -> dict[str, float]:
    """The `altup/…` metrics of one layer, from its unstacked host report."""
    tokens = max(float(report.tokens), 1.0)
    return {
        "altup/stream_cosine": float(report.cosine_sum / tokens),
        "altup/effective_streams": float(report.effective_sum / tokens),
        "altup/innovation": float(report.innovation_sum / tokens),
        "altup/departure": float(report.departure_sum / tokens),
        "altup/gain": float(np.mean(report.gain_sum) / tokens),
    }


def neuron_ratios(report: NeuronReport) -> dict[str, float]:
    """The `neurons/…` metrics of one layer, from its unstacked host report."""
    return {"neurons/active_fraction": float(report.active_sum / max(float(report.tokens), 1.0))}


def sequence_ratios(report: SequenceReport) -> dict[str, float]:
    """The `sequence/…` metrics of one layer, from its unstacked host report."""
    wanted = max(float(report.anchors + report.unplaced), 1.0)
    return {
        "sequence/anchor_fraction": float(report.anchors / max(float(report.tokens), 1.0)),
        "sequence/unplaced_fraction": float(report.unplaced / wanted),
        "sequence/slot_utilisation": float(report.anchors / max(float(report.slots), 1.0)),
    }


def selection_ratios(report: SelectionReport) -> dict[str, float]:
    """The `select/…` metrics of one layer, from its unstacked host report."""
    tokens = max(float(report.tokens), 1.0)
    return {
        "select/keep_fraction": float(report.chosen / tokens),
        "select/agreement": float(report.agreed / tokens),
        "select/gate": float(report.gate_sum / max(float(report.chosen), 1.0)),
    }


def heavy_ratios(report: HeavyReport) -> dict[str, float]:
    """The `select/…` metrics of one layer, from its unstacked host report: means over its choices."""
    tokens, rows = max(float(report.tokens), 1.0), max(float(report.rows), 1.0)
    return {
        "select/keep_fraction": float(np.mean(report.chosen) / tokens),
        "select/gate": float(np.mean(report.weight_sum / np.maximum(report.chosen, 1))),
        "select/residual": float(np.mean(report.residual_sum) / rows),
    }


def skim_ratios(report: SkimReport) -> dict[str, float]:
    """The `select/…` metrics of one layer, from its unstacked host report."""
    tokens = max(float(report.tokens), 1.0)
    spent = report.spending
    price = {} if spent is None or spent.price_sum is None else {"select/price": float(spent.price_sum / tokens)}
    return price | {
        "select/keep_fraction": float(report.kept / tokens),
        "select/unplaced_fraction": float(report.unplaced / tokens),
    }


def halting_ratios(layers: Sequence[HaltingReport]) -> dict[str, float]:
    """The `halting/…` metrics of a model, from the unstacked host reports of its layers."""
    if not layers:
        return {}
    tokens = max(float(layers[0].tokens), 1.0)
    depth = sum(float(report.running) for report in layers) / tokens
    remainder = sum(float(report.remainder_sum) for report in layers) / tokens
    return {
        "halting/mean_depth": depth,
        "halting/remainder": remainder,
        "halting/ponder": depth + remainder,
        "halting/weighted_depth": sum(n * float(found.weight_sum) for n, found in enumerate(layers, 1)) / tokens,
        "halting/last_fraction": float(layers[-1].halting) / tokens,
    }


def moe_ratios(report: MoEReport, experts_per_token: int, free: int = 0) -> dict[str, float]:
    """The `moe/…` metrics of one layer, from its unstacked host report (`to_host`). `free` of its experts, the last
    ones, have no slots."""
    load = np.asarray(report.assigned, np.float64)
    mean = max(load.mean(), 1e-9)
    assigned, tokens, slots = max(load.sum(), 1.0), max(float(report.tokens), 1.0), max(float(report.slots), 1.0)
    num_experts = load.shape[-1]
    in_slots = float(report.processed[: num_experts - free].sum())
    dropless = {} if report.block_rows is None else {"moe/block_fraction": float(report.block_rows / slots)}
    if report.exchange is not None:
        dropless |= {
            "moe/buffer_occupancy": float(report.exchange.received / max(float(report.exchange.room), 1.0)),
            "moe/safe_buffer_factor": float(np.flatnonzero(report.exchange.demand).max(initial=0) / 8),
        }
    return dropless | {
        "moe/drop_fraction": float(report.dropped.sum() / assigned),
        "moe/unserved_fraction": float(report.unserved / tokens),
        "moe/load_max_over_mean": float(load.max() / mean),
        "moe/load_cv": float(load.std() / mean),
        "moe/dead_experts": float((load < 0.01 * mean).sum()),
        "moe/router_entropy": float(report.entropy_sum / tokens / max(math.log(num_experts), 1e-9)),
        "moe/router_z": float(report.z_sum / tokens),
        "moe/slots_per_token": float(report.slots / tokens),
        "moe/slot_utilisation": in_slots / slots,
        "moe/experts_per_token": in_slots / tokens,  # that compute something
        "moe/balance_loss": float(report.balance_sum / max(float(report.balance_units), 1e-9)),
        "moe/balance_floor": balance_floor(int(report.tokens), num_experts, experts_per_token),
    }


def memory_ratios(report: MemoryReport, tables: Sequence[int], row_bytes: int) -> dict[str, float]:
    """The `memory/…` metrics of one layer, from its unstacked host report (`to_host`). `tables` are the rows of each of
    the tables that lie in one, `row_bytes` what fetching a row of them moves.

    The entropy is that of lookups over rows, divided by log rows, and the load the share of lookups that go to one row:
    means over the tables. Where the rows of a large table are counted in bins, both are of the bins, of all tables
    together, and the rows touched are estimated from the empty bins (Whang et al., TODS 1990)."""
    loads, rows = np.asarray(report.loads, np.float64), sum(tables)
    binned = len(loads) < rows
    parts = [loads] if binned else np.split(loads, np.cumsum(tables)[:-1])
    touched = float((loads > 0).sum())
    counted = {"memory/rows_touched": touched, "memory/dead_rows": rows - touched}
    if binned:
        empty = len(loads) - touched
        touched = min(-len(loads) * math.log(max(empty, 1) / len(loads)), float(rows))
        # With hardly an empty bin there is nothing to estimate from.
        counted = {"memory/rows_touched": touched, "memory/dead_rows": rows - touched} if empty >= 64 else {}
    tokens = max(float(report.tokens), 1.0)
    counted["memory/bytes_per_token"] = float(report.lookups * row_bytes / tokens)
    if report.rounds is not None and report.fetches is not None:
        counted["memory/fetch_rounds"] = float(report.rounds / report.fetches)
    gate = {} if report.gate_sum is None else {"memory/mean_gate": float(report.gate_sum / tokens)}
    return gate | {
        "memory/bucket_entropy": float(np.mean([_entropy(part) / max(math.log(len(part)), 1e-9) for part in parts])),
        "memory/max_load": float(np.mean([part.max() / max(part.sum(), 1.0) for part in parts])),
        **counted,
    }


def collapsed(loads: np.ndarray, tables: Sequence[int], floor: float) -> Optional[float]:
    """The bucket entropy as a share of what so many lookups could reach, if it is below `floor`. `loads` and `tables`
    are those of `memory_ratios`."""
    loads = np.asarray(loads, np.float64)
    parts = [loads] if len(loads) < sum(tables) else np.split(loads, np.cumsum(tables)[:-1])
    reachable = [math.log(max(min(len(part), part.sum()), 1.0)) for part in parts]
    shares = [_entropy(part) / most for part, most in zip(parts, reachable, strict=True) if most > 0]
    share = float(np.mean(shares)) if shares else 1.0
    return share if share < floor else None


def _entropy(load: np.ndarray) -> float:
    """Nats; 0 for no lookups at all."""
    p = load[load > 0] / max(load.sum(), 1.0)
    return float(-(p * np.log(p)).sum())


@functools.lru_cache(maxsize=256)
def balance_floor(tokens: int, num_experts: int, experts_per_token: int) -> float:
    """Expected max/mean load when each of `tokens` tokens draws k distinct experts uniformly.

    A load is Binomial(tokens, k/E); the loads sum to k·tokens, so their fluctuations are those of E centred normals
    with the mean taken out. The expected maximum of E standard normals comes from its exact integral; below 30
    expected pairs an expert, where the normal limit is poor, the draws are simulated with a fixed seed."""
    if tokens == 0 or experts_per_token >= num_experts:
        return 1.0
    mean = tokens * experts_per_token / num_experts
    if mean < 30:
        rng, maxima = np.random.default_rng(0), []
        for _ in range(max(4, min(64, 20_000_000 // (tokens * num_experts)))):
            order = rng.random((tokens, num_experts)).argpartition(experts_per_token - 1, axis=-1)
            maxima.append(np.bincount(order[:, :experts_per_token].ravel(), minlength=num_experts).max())
        return float(np.mean(maxima) / mean)
    z = np.linspace(-8.0, 8.0, 4001)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z]) ** num_experts
    expected_max = z[-1] - np.trapezoid(below, z)
    spread = math.sqrt(
        tokens
        * (experts_per_token / num_experts)
        * (1 - experts_per_token / num_experts)
        * num_experts
        / (num_experts - 1)
    )
    return float(1 + expected_max * spread / mean)
