"""Tokens that leave the row on the way through an encoder, and no later layer computes on.

A block is run between two decisions: one before its attention, from the hidden state, and one after it, from what the
tokens' keys received; a method makes one of them. Executions are equal in value and gradient: `masked` computes on all
tokens and leaves those that are gone out of attention, `compact` takes them out of the arrays, every layer having room
for a fixed share of the row. What does not fit goes, lowest first, and is counted."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import SkimReport, SpendingReport, count
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.budgets import Price, Work
from sparsejax.blocks.context import BlockOutput, Context, Totals
from sparsejax.blocks.residual import reported
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
    decided: Optional[Float[Array, "B T"]] = None  # in soft training, the gate that evaluation would take


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

    learns = False
    """Whether there is a loss of what is kept."""
    counts_first = False
    """Whether `losses` wants the reports of the whole step when the step has several microbatches."""

    def losses(
        self,
        layers: Sequence[SkimReport],
        works: Sequence[Work],
        totals: Totals,
        counted: Optional[Sequence[SkimReport]] = None,
    ) -> dict[str, Float[Array, ""]]:
        """Named loss terms, weighted, of the reports of all layers; `counted` are those of the whole step."""
        return {}

    def next_price(
        self, price: Float[Array, "*R"], layers: Sequence[SkimReport], works: Sequence[Work]
    ) -> Float[Array, "*R"]:
        """For the next step, from the reports of this one."""
        return price


@dataclass(frozen=True, kw_only=True)
class NoSkim(Skim):
    """All tokens go through all layers."""


@dataclass(frozen=True, kw_only=True)
class Skimming(Skim, abc.ABC):
    """What all methods can be told. Evaluation decides hard, and without noise."""

    stage: Literal["soft", "hard"] = "soft"  # of training; hard: the weights learn with the tokens really gone
    execution: Literal["masked", "compact"] = "masked"  # of hard decisions
    ladder: tuple[float, ...] = ()  # shares of the row's length that each layer has room for; (): the whole row

    def __post_init__(self):
        for share in self.ladder:
            if not 0 < share <= 1:
                raise ConfigError("ladder", f"{share} is outside (0, 1]")
        if any(later > earlier for earlier, later in zip(self.ladder, self.ladder[1:], strict=False)):
            raise ConfigError("ladder", f"{self.ladder} rises: a token that is gone does not come back")
        if self.execution == "compact" and not self.ladder:
            raise ConfigError("ladder", "execution=compact needs a share of the row's length for every layer")

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
        where = {"segments": batch.segments, "positions": batch.positions, "sizes": sizes_BT}
        return Survivors(x=x, keep=keep_BT, **where, decided=keep_BT if self.counts_first else None)

    def end(self, x: Survivors, batch: Batch) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
        return x.x, x.keep

    priced = False
    """Whether a price follows what is spent."""


class SkimmedBlock(nnx.Module):
    """A Transformer block on the tokens that are left."""

    def __init__(self, block: Any, chooser: Chooser, settings: Skimming):
        self.block, self.chooser, self.settings = block, chooser, settings
        self.price = Price(jnp.zeros(()), axes=()) if settings.priced else None

    def __call__(self, row: Survivors, context: Context, cache: None = None) -> BlockOutput:
        soft = context.mode == "train" and self.settings.stage == "soft"
        compact = self.settings.execution == "compact" and not soft
        tokens, lost = count(context.batch.segments > 0), jnp.int32(0)
        with jax.named_scope("skim"):
            decision = self._decide(self.chooser.before, row, context, soft, row.x)
            row, more = self._go(row, decision, context, soft, compact)
            lost += more
        with jax.named_scope("attention"):
            normed = self.block.attention_norm(row.x)
            begins = row
            where = row.positions, row.segments, row.keep
            attended, received, own, key = self.block.attention.among(normed, *where, learned=soft)
            row = dataclasses.replace(row, x=row.x + attended)
        with jax.named_scope("skim"):
            decision = self._decide(self.chooser.after, row, context, soft, received=received, own=own, key=key)
            row, more = self._go(row, decision, context, soft, compact)
            lost += more
        with jax.named_scope("feed_forward"):
            batch = dataclasses.replace(context.batch, segments=jnp.where(row.keep > 0, row.segments, 0))
            left = dataclasses.replace(context, batch=batch)
            y_BTD, found = self.block.feed_forward(self.block.feed_forward_norm(row.x), left)
            row = dataclasses.replace(row, x=row.x + y_BTD)
        report = SkimReport(
            tokens=tokens,
            kept=count(row.keep > 0.5),
            keep_sum=row.keep.sum(),
            unplaced=lost,
            attended=count(begins.keep > 0),
            keys=_pairs((begins.keep > 0).astype(jnp.float32), begins, context.batch),
            left=count(row.keep > 0),
            spending=self._spent(begins, row, context.batch),
        )
        kept_BT = _places(row, context.batch) if context.record else None
        return BlockOutput(x=row, report=dataclasses.replace(reported(found), skim=report, kept=kept_BT))

    def _spent(self, begins: Survivors, ends: Survivors, batch: Batch) -> Optional[SpendingReport]:
        """From the row when attention begins and that after it."""
        if begins.decided is None or ends.decided is None:
            return None
        all_BT = jnp.where(batch.segments > 0, 2 * batch.positions + 1, 0)  # n² = 1 + 3 + … for the n of a document
        return SpendingReport(
            attended_sum=begins.keep.sum(),
            keys_sum=_pairs(begins.keep, begins, batch),
            all_keys=all_BT.sum(dtype=jnp.float32),
            would_attend=count(begins.decided > 0),
            would_pair=_pairs(begins.decided, begins, batch),
            would_stay=count(ends.decided > 0),
            price_sum=None if self.price is None else self.price[...] * count(batch.segments > 0),
        )

    def _decide(self, decide, row: Survivors, context: Context, soft: bool, *given, **attention) -> Optional[Decision]:
        zeros = jnp.zeros_like(row.keep)
        nothing = {"received": zeros, "own": zeros, "key": zeros[..., None]}
        seen = Seen(**(nothing | attention), layer=jnp.asarray(context.layer))
        if context.key is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(context.key, context.batch.rows)
            seen = dataclasses.replace(seen, keys=keys)
        decision = decide(*given, row, seen, soft)
        if decision is None or row.decided is None or not soft:
            return decision
        hard = decide(*given, dataclasses.replace(row, keep=row.decided), seen, False)
        return dataclasses.replace(decision, decided=jax.lax.stop_gradient(hard.gate))

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
            if row.decided is not None:
                would_BT = None if decision.decided is None else jnp.where(first_BT, 1.0, decision.decided)
                decided_BT = keep_BT if would_BT is None else row.decided * would_BT
                row = dataclasses.replace(row, decided=decided_BT)
            if compact:
                place_BS = survivors(keep_BT > 0, size)
                row = jax.tree.map(lambda array: at(array, place_BS), row)
            return row, lost_BT

        room = room[layer] if cut else room[0]
        row, lost_BT = on_each_device(local, (BY_ROW, BY_ROW, P()), (BY_ROW, BY_ROW))(row, decision, room)
        return row, count(lost_BT)


def _places(row: Survivors, batch: Batch) -> Bool[Array, "B T"]:
    """Which tokens of the whole row are left, however short the row has become."""

    def local(row: Survivors, batch: Batch) -> tuple[Array]:
        same_BTS = batch.segments[:, :, None] == jnp.where(row.keep > 0, row.segments, -1)[:, None, :]
        return ((same_BTS & (batch.positions[:, :, None] == row.positions[:, None, :])).any(-1),)

    return on_each_device(local, (BY_ROW, BY_ROW), (BY_ROW,))(row, batch)[0]


def _pairs(weight_BT: Float[Array, "B T"], row: Survivors, batch: Batch) -> Float[Array, ""]:
    """Σ over tokens and those of their document of the product of their weights."""

    def local(weight_BT: Array, segments_BT: Array) -> tuple[Array]:
        return (weight_BT * over_document(weight_BT, segments_BT, batch.segments.shape[1]),)

    return on_each_device(local, (BY_ROW, BY_ROW), (BY_ROW,))(weight_BT, row.segments)[0].sum()
