"""What layers return beside their output.

A report holds *sums and integer counts* only, so that layers stack by `lax.scan`, microbatches, devices and steps add
by `+`, and a ratio is taken once, at the very end (`base.ratios`). The ledger's law, for every layer and expert:
`assigned = processed + dropped`.

Two things have to wait for the end of the model before they are sums: what a policy chose, whose reward is the token's
loss (`MoEReport.choices`), and what a token's layers are compared with together (`SelectionReport.gates`).
`model.lm.scored` makes sums of them, before anything is added."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import to_numpy
from sparsejax.base.structs import struct


def count(true: Bool[Array, "..."]) -> Int[Array, ""]:
    """How many are, int32."""
    return true.sum(dtype=jnp.int32)


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
    float32. `decisions` and `logits` alone are no sums, and are taken out before reports are added."""

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
    gate_sum: Optional[Float[Array, "*R"]] = None  # Σ over tokens of the routed experts' part, beside shared ones
    gated: Optional[Int[Array, "*R"]] = None  # the number of those tokens
    dual_sum: Optional[Float[Array, "*R E"]] = None  # Σ over groups of what the balance controller measured
    dual_units: Optional[Float[Array, "*R"]] = None  # the number of those groups
    pressed_sum: Optional[Float[Array, "*R E"]] = None  # coefficient · Σ over tokens of scores, of a controller's loss
    decisions: Optional[Decisions] = None  # when the model is asked to record them
    logits: Optional[Float[Array, "B T E"]] = None  # when the next router adds to them; `handed_on` takes them out
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
class HeavyReport:
    """One layer with a light branch for all tokens and a heavy one for those of N choices, such as queries, keys and
    tokens of the network (leading axes: repeats of the layer). Counts are int32, sums float32."""

    tokens: Int[Array, "*R"]  # unmasked tokens
    rows: Int[Array, "*R"]  # that have some
    chosen: Int[Array, "*R N"]  # tokens
    slots: Int[Array, "*R N"]  # room that the static shapes gave
    weight_sum: Float[Array, "*R N"]  # Σ over chosen tokens
    residual_sum: Float[Array, "*R N"]  # Σ over rows of |Σ weights − k|, k being what they should add up to


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
    heavy: Optional[HeavyReport] = None
    skim: Optional[SkimReport] = None
    halting: Optional[HaltingReport] = None
    kept: Optional[Bool[Array, "*R B T"]] = None  # recorded: which tokens a layer computed on that need not take all


def handed_on(
    report: Report, before: Optional[Float[Array, "B T E"]]
) -> tuple[Report, Optional[Float[Array, "B T E"]]]:
    """A layer's report without the logits that the next router adds to, and those: its own, or the ones `before` it."""
    if report.moe is None or report.moe.logits is None:
        return report, before
    return dataclasses.replace(report, moe=dataclasses.replace(report.moe, logits=None)), report.moe.logits


Reports = Mapping[str, Report]
"""By position of the block in the model; a position in the repeated pattern holds stacked reports."""


@struct
class Recorded:
    """What was recorded token by token, by position."""

    decisions: dict[str, Decisions]
    kept: dict[str, Bool[Array, "*R B T"]]


def split_recorded(reports: Reports) -> tuple[dict[str, Report], Recorded]:
    """The reports without what was recorded, which does not add up, and that."""
    sums, decisions, kept = {}, {}, {}
    for position, report in reports.items():
        if report.kept is not None:
            kept[position] = report.kept
        moe = report.moe
        if moe is not None and moe.decisions is not None:
            decisions[position] = moe.decisions
            moe = dataclasses.replace(moe, decisions=None)
        sums[position] = dataclasses.replace(report, moe=moe, kept=None)
    return sums, Recorded(decisions=decisions, kept=kept)


def add(left: Any, right: Any) -> Any:
    """Two pytrees of sums and counts of the same structure, added."""
    return jax.tree.map(lambda a, b: a + b, left, right)


def to_host(reports: Any) -> Any:
    """Device reports as NumPy, integers widened to int64 so that a window of many steps cannot overflow."""
    wide = {"i": np.int64, "u": np.int64, "f": np.float64, "V": np.float64}  # V: bfloat16
    return jax.tree.map(lambda a: to_numpy(a).astype(wide.get(a.dtype.kind, a.dtype)), reports)
