"""What layers return beside their output, and the ratios drawn from it.

A report holds *sums and integer counts* only, so that layers stack by `lax.scan`, microbatches, devices and steps add
by `+`, and a ratio is taken once, at the very end. The ledger's law, for every layer and expert: `assigned =
processed + dropped`.

Two things have to wait for the end of the model before they are sums: what a policy chose, whose reward is the token's
loss (`MoEReport.choices`), and what a token's layers are compared with together (`SelectionReport.gates`).
`model.lm.scored` makes sums of them, before anything is added."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import to_numpy
from sparsejax.base.structs import struct


@struct
class Decisions:
    """What one mixture-of-experts layer decided token by token (leading axes: repeats of the layer). Padding has no
    expert."""

    experts: Int[Array, "*R B T K"]  # in the order of its choices; −1 where a token has fewer than K
    ranking: Float[Array, "*R B T K"]  # what they were chosen by
    weights: Float[Array, "*R B T K"]  # what their outputs are multiplied with
    kept: Bool[Array, "*R B T K"]  # found a slot
    best: Float[Array, "*R B T"]  # the highest ranking of any expert
    margin: Float[Array, "*R B T"]  # the lowest ranking chosen − the highest not chosen


@struct
class Choices:
    """What a policy did with each token (leading axes: repeats of the layer)."""

    log_probability: Float[Array, "*R B T"]  # of the expert it chose
    baseline: Float[Array, "*R B T"]  # the reward it expected


@struct
class ExchangeReport:
    """Rows of a dropless layer that moved between devices (leading axes: repeats of the layer). Counts are int32."""

    dropped: Int[Array, "*R E"]  # pairs that did not fit the buffer of their expert's device
    received: Int[Array, "*R"]  # rows
    room: Int[Array, "*R"]  # rows that the buffers could have taken
    demand: Int[Array, "*R 65"]  # how often a device was asked to take n/8 of the rows of an even load, n rounded up


def demand_of(wanted: Int[Array, ""], even: int) -> Int[Array, " 65"]:
    """One device's `demand`, asked to take so many rows where `even` would be its share."""
    eighths = jnp.minimum(-(-8 * wanted // even), 64)
    return (jnp.arange(65) == eighths).astype(jnp.int32)


@struct
class MoEReport:
    """One mixture-of-experts layer over some tokens (leading axes: repeats of the layer). Counts are int32, sums
    float32. `decisions` alone is no sum: `split_decisions` takes it out before reports are added."""

    assigned: Int[Array, "*R E"]  # pairs the router chose, before capacity
    processed: Int[Array, "*R E"]  # of them, those that sit in a slot
    dropped_capacity: Int[Array, "*R E"]  # pairs that found their expert full
    tokens: Int[Array, "*R"]  # unmasked tokens
    masked: Int[Array, "*R"]  # padding: neither routed nor counted anywhere else
    unserved: Int[Array, "*R"]  # unmasked tokens with no processed pair
    slots: Int[Array, "*R"]  # slots the static shapes gave
    probability_sum: Float[Array, "*R E"]  # Σ over tokens of the score, normalised over experts
    entropy_sum: Float[Array, "*R"]  # Σ over tokens of that distribution's entropy, nats
    z_sum: Float[Array, "*R"]  # Σ over tokens of logsumexp(logits)²
    balance_sum: Float[Array, "*R"]  # Σ over units of the balance, 1 at best; a unit is what its scope names
    balance_units: Float[Array, "*R"]  # the number of those units
    exchange: Optional[ExchangeReport] = None  # of a dropless layer whose experts are split over devices
    block_rows: Optional[Int[Array, "*R"]] = None  # slots of a dropless layer that were blocks of uneven loads
    balance_measured: Optional[Float[Array, "*R N E"]] = None  # Σ over tokens of what the balance measured
    dual_sum: Optional[Float[Array, "*R E"]] = None  # Σ over groups of what the balance controller measured
    dual_units: Optional[Float[Array, "*R"]] = None  # the number of those groups
    pressed_sum: Optional[Float[Array, "*R E"]] = None  # coefficient · Σ over tokens of scores, of a controller's loss
    decisions: Optional[Decisions] = None  # when the model is asked to record them
    choices: Optional[Choices] = None  # of a policy, until the rewards are known
    policy_sum: Optional[Float[Array, "*R"]] = None  # Σ over rewarded tokens of −(reward − baseline) · log π
    baseline_sum: Optional[Float[Array, "*R"]] = None  # Σ over rewarded tokens of (reward − baseline)²

    @property
    def dropped(self) -> Int[Array, "*R E"]:
        """Dropped pairs, all causes."""
        return self.dropped_capacity + (0 if self.exchange is None else self.exchange.dropped)


@struct
class MemoryReport:
    """One lookup layer over some tokens (leading axes: repeats of the layer). Counts are int32, sums
    float32."""

    loads: Int[Array, "*R N"]  # lookups of each row, or, of a table with more than 65,536, of each bin of hashed rows
    lookups: Int[Array, "*R"]
    tokens: Int[Array, "*R"]  # unmasked tokens
    masked: Int[Array, "*R"]  # padding: looks nothing up and is counted nowhere else
    gate_sum: Optional[Float[Array, "*R"]] = None  # Σ over tokens of how far the gate was open
    measured: Optional[Float[Array, "..."]] = None  # what the address adds to its running sums
    probability_sum: Optional[Float[Array, "*R N"]] = None  # of each row, over tokens, if a loss reads it
    fetches: Optional[Int[Array, "*R"]] = None  # times that the layer was given rows
    rounds: Optional[Int[Array, "*R"]] = None  # Σ over them of the rounds of exchange until all rows had arrived


@struct
class StreamReport:
    """A residual of K streams after one layer, over a sample of its unmasked tokens (leading axes: repeats of the
    layer). Sums are float32."""

    tokens: Int[Array, "*R"]
    cosine_sum: Float[Array, "*R"]  # Σ of the mean cosine of two different streams
    effective_sum: Float[Array, "*R"]  # Σ of (Σ λ)² / Σ λ², λ the eigenvalues of the streams' inner products
    innovation_sum: Float[Array, "*R"]  # Σ of ‖y − expected y‖ / ‖y‖
    departure_sum: Float[Array, "*R"]  # Σ of ‖P − I‖, Frobenius
    gain_sum: Float[Array, "*R K"]  # Σ of g


@struct
class NeuronReport:
    """One feed-forward network of which most neurons are silent (leading axes: repeats of the layer)."""

    tokens: Int[Array, "*R"]  # unmasked tokens
    active_sum: Float[Array, "*R"]  # Σ over them of the share of neurons that are not


@struct
class SequenceReport:
    """One layer that computes on every k-th token (leading axes: repeats of the layer). Counts are int32."""

    tokens: Int[Array, "*R"]  # unmasked tokens
    anchors: Int[Array, "*R"]  # of them, those that it computed on
    unplaced: Int[Array, "*R"]  # those that it should have, but had no room for
    slots: Int[Array, "*R"]  # room that the static shapes gave


@struct
class SelectionReport:
    """One layer that computes on chosen tokens (leading axes: repeats of the layer). Counts are int32, sums float32."""

    tokens: Int[Array, "*R"]  # unmasked tokens
    chosen: Int[Array, "*R"]  # of them, those that it computed on
    agreed: Int[Array, "*R"]  # those of whom the causal choice says the same as the choice among the whole row
    gate_sum: Float[Array, "*R"]  # Σ over chosen tokens
    surprise_sum: Float[Array, "*R"]  # Σ over tokens of the cross entropy of the causal choice with the other, nats
    keys: Optional[Float[Array, "*R"]] = None  # (query, key) pairs of those that it computed on, where no shape tells
    gates: Optional[Float[Array, "*R B T"]] = None  # of every token, until those of all layers are known
    far_sum: Optional[Float[Array, "*R"]] = None  # the layer's part of Σ over tokens of |mean of its gates − target|


@struct
class SpendingReport:
    """What a layer whose tokens leave spends, where that has a budget (leading axes: repeats of the layer)."""

    attended_sum: Float[Array, "*R"]  # Σ of the tokens' weights when attention begins
    keys_sum: Float[Array, "*R"]  # Σ over pairs of a document of the product of their weights
    all_keys: Float[Array, "*R"]  # pairs if no token had left
    would_attend: Int[Array, "*R"]  # as evaluation would decide on these states: tokens when attention begins,
    would_pair: Float[Array, "*R"]  # (query, key) pairs among them,
    would_stay: Int[Array, "*R"]  # and tokens after attention
    price_sum: Optional[Float[Array, "*R"]] = None  # Σ over tokens of the price of a hard budget


@struct
class SkimReport:
    """One layer after which fewer tokens are left (leading axes: repeats of the layer). Counts are int32, sums
    float32."""

    tokens: Int[Array, "*R"]  # unmasked tokens of the batch
    kept: Int[Array, "*R"]  # of them, those that are left
    keep_sum: Float[Array, "*R"]  # Σ of their weights
    unplaced: Int[Array, "*R"]  # those that should have stayed, but had no room
    attended: Int[Array, "*R"]  # tokens with any weight when attention begins
    keys: Float[Array, "*R"]  # (query, key) pairs among them
    left: Int[Array, "*R"]  # tokens with any weight after it
    spending: Optional[SpendingReport] = None


@struct
class HaltingReport:
    """One layer as a step that tokens take until they halt (leading axes: repeats of the layer). Counts are int32, sums
    float32."""

    tokens: Int[Array, "*R"]  # unmasked tokens
    running: Int[Array, "*R"]  # of them, those that took the step
    halting: Int[Array, "*R"]  # of these, those whose last step it was
    weight_sum: Float[Array, "*R"]  # Σ over those running of the weight of the step
    remainder_sum: Float[Array, "*R"]  # Σ over those halting of their remainder, the weight of their last step
    probability_sum: Float[Array, "*R"]  # Σ over those running of the probability of halting, which the last step has 1
    prior_sum: Float[Array, "*R"]  # Σ over tokens of the step's part of the divergence from the prior, nats
    keys: Float[Array, "*R"]  # (query, key) pairs of those running


@struct
class Report:
    """What one block returns: a part for each kind of conditional computation in it, None where there is none."""

    moe: Optional[MoEReport] = None
    neurons: Optional[NeuronReport] = None
    memory: dict[str, MemoryReport] = dataclasses.field(default_factory=dict)  # by name
    streams: Optional[StreamReport] = None
    sequence: Optional[SequenceReport] = None
    selection: Optional[SelectionReport] = None
    skim: Optional[SkimReport] = None
    halting: Optional[HaltingReport] = None


Reports = Mapping[str, Report]
"""By position of the block in the model; a position in the repeated pattern holds stacked reports."""


def split_decisions(reports: Reports) -> tuple[dict[str, Report], dict[str, Decisions]]:
    """The reports without what was recorded, which does not add up, and that, by position."""
    sums, decisions = dict(reports), {}
    for position, report in reports.items():
        if report.moe is not None and report.moe.decisions is not None:
            decisions[position] = report.moe.decisions
            sums[position] = dataclasses.replace(report, moe=dataclasses.replace(report.moe, decisions=None))
    return sums, decisions


def add(left: Any, right: Any) -> Any:
    """Two pytrees of sums and counts of the same structure, added."""
    return jax.tree.map(lambda a, b: a + b, left, right)


def to_host(reports: Any) -> Any:
    """Device reports as NumPy, integers widened to int64 so that a window of many steps cannot overflow."""
    wide = {"i": np.int64, "u": np.int64, "f": np.float64, "V": np.float64}  # V: bfloat16
    return jax.tree.map(lambda a: to_numpy(a).astype(wide.get(a.dtype.kind, a.dtype)), reports)


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


def collapsed(report: MemoryReport, tables: Sequence[int], floor: float) -> Optional[float]:
    """The bucket entropy as a share of what so many lookups could reach, if it is below `floor`."""
    loads = np.asarray(report.loads, np.float64)
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
