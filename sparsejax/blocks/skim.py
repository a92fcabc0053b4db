"""Tokens that leave the row on the way through an encoder, and no later layer computes on.

A block is run between two decisions: one before its attention, from the hidden state, and one after it, from what the
tokens' keys received; a method makes one of them. Executions are equal in value and gradient: `masked` computes on all
tokens and leaves those that are gone out of attention, `compact` takes them out of the arrays, every layer having room
for a fixed share of the row. What does not fit goes, lowest first, and is counted."""

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report, SkimReport
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import BlockOutput, Context, Totals
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.anchors import at
from sparsejax.ops.skim import Survivors, over_document, rank, survivors

BY_ROW = P(BATCH_AXES)


@struct
class Seen:
    """What a decision may go by."""

    received: Float[Array, "B T"]  # mean over heads and queries of the attention that the token's key got
    own: Float[Array, "B T"]  # mean over heads of that to itself
    key: Float[Array, "B T H"]  # mean over heads
    layer: Int[Array, ""]
    keys: Optional[PRNGKeyArray] = None  # one a row, in training


@struct
class Decision:
    """`gate` multiplies `keep`; `priority` says who goes first where there is no room, the lowest; `x`, if given, takes
    the place of the states."""

    gate: Float[Array, "B T"]
    priority: Float[Array, "B T"]
    x: Optional[Float[Array, "B T D"]] = None


class Chooser(nnx.Module):
    """The parameters with which one layer decides. Functions of one device's rows."""

    def before(self, x_BTD: Float[Array, "B T D"], row: Survivors, seen: Seen, soft: bool) -> Optional[Decision]:
        """From the state, before attention; `seen` has no attention yet."""
        return None

    def after(self, row: Survivors, seen: Seen, soft: bool) -> Optional[Decision]:
        """From attention, before the feed-forward part."""
        return None


class Skim:
    """A config's description of which tokens leave: the base of the frozen dataclasses in `blocks.SKIMS`."""

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone) -> nnx.Module:
        """`block`, with the decisions of its layer."""
        return block

    def begin(self, x: Any, batch: Batch) -> Any:
        """What the first layer gets."""
        return x

    def end(self, x: Any, batch: Batch) -> tuple[Any, Float[Array, "B T"]]:
        """(hidden states, weight of each) that the head pools."""
        return x, (batch.segments > 0).astype(jnp.float32)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of one layer's decisions."""
        return {}

    def losses(self, reports: list[Report], totals: Totals) -> dict[str, Float[Array, ""]]:
        """Named loss terms, weighted, of the (possibly stacked) reports of all layers."""
        return {}


@dataclass(frozen=True, kw_only=True)
class NoSkim(Skim):
    """All tokens go through all layers."""


@dataclass(frozen=True, kw_only=True)
class Skimming(Skim, abc.ABC):
    """What all methods can be told. Evaluation decides hard, and without noise."""

    stage: Literal["soft", "hard"] = "soft"  # of training; hard: the weights learn with the tokens really gone
    execution: Literal["masked", "compact"] = "masked"  # of hard decisions
    ladder: tuple[float, ...] = ()  # shares of the row's length that each layer has room for; (): the whole row
    coefficient: float = 0.1  # price of the kept fraction, mean over layers

    def __post_init__(self):
        for share in self.ladder:
            if not 0 < share <= 1:
                raise ConfigError("ladder", f"{share} is outside (0, 1]")
        if any(later > earlier for earlier, later in zip(self.ladder, self.ladder[1:], strict=False)):
            raise ConfigError("ladder", f"{self.ladder} rises: a token that is gone does not come back")
        if self.execution == "compact" and not self.ladder:
            raise ConfigError("ladder", "execution=compact needs a share of the row's length for every layer")
        if self.coefficient < 0:
            raise ConfigError("coefficient", f"{self.coefficient} is negative; allowed: 0 or more")

    def unused(self) -> dict[str, str]:
        return {"coefficient": "stage=hard: what is kept has no gradient"} if self.stage == "hard" else {}

    def check(self, num_layers: int) -> None:
        """Raises `ConfigError` unless there is a share for every layer."""
        if self.ladder and len(self.ladder) != num_layers:
            raise ConfigError("ladder", f"{len(self.ladder)} shares for {num_layers} layers")

    def room(self, layer: int, length: int) -> int:
        """Tokens that the feed-forward part of this layer, and what comes after it, has room for."""
        return math.ceil(self.ladder[layer] * length)

    @abc.abstractmethod
    def chooser(self, key: PRNGKeyArray, backbone: Backbone) -> Chooser:
        """Of one layer."""

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone) -> "SkimmedBlock":
        return SkimmedBlock(block, self.chooser(key, backbone), self)

    def begin(self, x: Float[Array, "B T D"], batch: Batch) -> Survivors:
        def local(segments_BT: Array) -> tuple[Array]:
            return (over_document(jnp.ones_like(segments_BT), segments_BT, segments_BT.shape[1]),)

        sizes_BT = on_each_device(local, (BY_ROW,), (BY_ROW,))(batch.segments)[0]
        keep_BT = (batch.segments > 0).astype(jnp.float32)
        return Survivors(x=x, keep=keep_BT, segments=batch.segments, positions=batch.positions, sizes=sizes_BT)

    def end(self, x: Survivors, batch: Batch) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
        return x.x, x.keep

    def losses(self, reports: list[Report], totals: Totals) -> dict[str, Float[Array, ""]]:
        if self.stage == "hard":
            return {}
        kept = [report.skim.keep_sum for report in reports if report.skim is not None]
        each = [jnp.sum(sums) / totals.tokens for sums in kept]
        layers = sum(sums.size for sums in kept)
        return {"skim": self.coefficient * sum(each[1:], each[0]) / layers}


class SkimmedBlock(nnx.Module):
    """A Transformer block on the tokens that are left."""

    def __init__(self, block: Any, chooser: Chooser, settings: Skimming):
        self.block, self.chooser, self.settings = block, chooser, settings

    def __call__(self, row: Survivors, context: Context, cache: None = None) -> BlockOutput:
        soft = context.mode == "train" and self.settings.stage == "soft"
        compact = self.settings.execution == "compact" and not soft
        tokens, lost = _count(context.batch.segments > 0), jnp.int32(0)
        with jax.named_scope("skim"):
            decision = self._decide(self.chooser.before, row, context, soft, row.x)
            row, more = self._go(row, decision, context, soft, compact)
            lost += more
        with jax.named_scope("attention"):
            normed = self.block.attention_norm(row.x)
            begins, keys = _count(row.keep > 0), _pairs(row, context.batch.segments.shape[1])
            where = row.positions, row.segments, row.keep
            attended, received, own, key = self.block.attention.among(normed, *where, learned=soft)
            row = dataclasses.replace(row, x=row.x + attended)
        with jax.named_scope("skim"):
            decision = self._decide(self.chooser.after, row, context, soft, received=received, own=own, key=key)
            row, more = self._go(row, decision, context, soft, compact)
            lost += more
        with jax.named_scope("feed_forward"):
            y_BTD, _ = self.block.feed_forward(self.block.feed_forward_norm(row.x), context)
            row = dataclasses.replace(row, x=row.x + y_BTD)
        report = SkimReport(
            tokens=tokens,
            kept=_count(row.keep > 0.5),
            keep_sum=row.keep.sum(),
            unplaced=lost,
            attended=begins,
            keys=keys,
            left=_count(row.keep > 0),
        )
        return BlockOutput(x=row, report=Report(skim=report))

    def _decide(self, decide, row: Survivors, context: Context, soft: bool, *given, **attention) -> Optional[Decision]:
        zeros = jnp.zeros_like(row.keep)
        nothing = {"received": zeros, "own": zeros, "key": zeros[..., None]}
        seen = Seen(**(nothing | attention), layer=jnp.asarray(context.layer))
        if context.key is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(context.key, context.batch.rows)
            seen = dataclasses.replace(seen, keys=keys)
        return decide(*given, row, seen, soft)

    def _go(
        self, row: Survivors, decision: Optional[Decision], context: Context, soft: bool, compact: bool
    ) -> tuple[Survivors, Int[Array, ""]]:
        """(who is left, how many had to go for want of room)."""
        if decision is None:
            return row, jnp.int32(0)
        length, layer = context.batch.segments.shape[1], context.layer
        cut = bool(self.settings.ladder) and not soft
        size = self.settings.room(layer, length) if compact and isinstance(layer, int) else length
        room = jnp.asarray([self.settings.room(n, length) for n in range(len(self.settings.ladder))] or [length])

        def local(row: Survivors, decision: Decision, room: Array) -> tuple[Survivors, Array]:
            first_BT = (row.positions == 0) & (row.segments > 0)
            keep_BT = row.keep * jnp.where(first_BT, 1.0, decision.gate)
            priority_BT = jnp.where(first_BT, jnp.inf, decision.priority)
            lost_BT = jnp.zeros(keep_BT.shape, bool)
            if cut:
                lost_BT = (keep_BT > 0) & (rank(priority_BT, keep_BT > 0) >= room)
                keep_BT = jnp.where(lost_BT, 0, keep_BT)
            row = dataclasses.replace(row, keep=keep_BT, x=row.x if decision.x is None else decision.x)
            if compact:
                place_BS = survivors(keep_BT > 0, size)
                row = jax.tree.map(lambda array: at(array, place_BS), row)
            return row, lost_BT

        room = room[layer] if cut else room[0]
        row, lost_BT = on_each_device(local, (BY_ROW, BY_ROW, P()), (BY_ROW, BY_ROW))(row, decision, room)
        return row, _count(lost_BT)


def _pairs(row: Survivors, most: int) -> Float[Array, ""]:
    """Σ over living tokens of the living in their document."""

    def local(row: Survivors) -> tuple[Array]:
        alive_BT = (row.keep > 0).astype(jnp.int32)
        return (alive_BT * over_document(alive_BT, row.segments, most),)

    return on_each_device(local, (BY_ROW,), (BY_ROW,))(row)[0].sum(dtype=jnp.float32)


def _count(true: Bool[Array, "..."]) -> Int[Array, ""]:
    return true.sum(dtype=jnp.int32)
