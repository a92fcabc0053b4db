"""Tokens that stop at some layer of the stack, each when it has had enough.

Every layer is a step. After it a token gets a probability of halting, from which the kind of halting makes the weight
of the step; what the model reads of a token in the end is the sum of its states, weighted. A token that has halted
keeps its state, and the layers after compute nothing on it. That state may stay visible: later layers then make keys
and values of it.

Executions are equal: `masked` computes every layer on all tokens, `compact` gathers those that are running, in rooms
of a few sizes, and skips a layer that none of the batch needs. Training is masked."""

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.reports import HaltingReport, Report, count
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Mode, Totals
from sparsejax.nn.attention import KVCache
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.anchors import at
from sparsejax.ops.halting import Halted, Halting, begin
from sparsejax.ops.selection import put
from sparsejax.ops.skim import in_a_room, pairs, survivors

BY_ROW: Any = P(BATCH_AXES)
Probability = Float[Array, "B T"]
Terms = dict[str, Float[Array, ""]]


class HaltingSpec:
    """A config's description of where tokens halt: the base of the frozen dataclasses in `blocks.HALTINGS`."""

    by_step = False
    """Whether training loses what every step's state does, weighted by that step's weight."""

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone) -> nnx.Module:
        """`block`, as one step."""
        return block

    def begin(self, x: Any, batch: Batch) -> Any:
        """What the first layer gets."""
        return x

    def end(self, x: Any) -> Any:
        """What the head reads of what the last layer gives."""
        return x

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of one layer's decision."""
        return {}

    def head_costs(self, vocab_size: int, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of the heads that training has beside the last."""
        steps = backbone.num_layers - 1 if self.by_step else 0
        return {"exit_heads": Cost(per_token=2 * steps * vocab_size * backbone.d_model)} if steps else {}

    def halted_flops(self, backbone: Backbone) -> float:
        """Forward FLOPs that a layer spends on a token that has halted."""
        return 0.0

    def losses(self, reports: Sequence[Report], totals: Totals, counted: Optional[Sequence[Report]]) -> Terms:
        """Named loss terms, weighted, of the reports of all layers, the first one first. `counted` are those of the
        whole step, if there was a pass that counted."""
        return {}

    @property
    def counts_first(self) -> bool:
        """Whether `losses` wants the reports of the whole step when the step has several microbatches."""
        return False


@dataclass(frozen=True, kw_only=True)
class NoHalting(HaltingSpec):
    """Every token goes through all layers."""


@dataclass(frozen=True, kw_only=True)
class TokenHalting(HaltingSpec, abc.ABC):
    """What all kinds of halting can be told."""

    execution: Literal["compact", "masked"] = "compact"  # of evaluation and generation

    visible = True
    """Whether later layers attend to the state of a token that has halted."""

    @abc.abstractmethod
    def chooser(self, backbone: Backbone) -> "Chooser":
        """What gives the halting probability after a layer."""

    @abc.abstractmethod
    def step(self, state: Halting, probability: Probability, last: Any, mode: Mode) -> tuple[Array, Halting]:
        """(weight of this step, state after it)."""

    def prior_part(self, weight: Probability, layer: Int[Array, ""], num_layers: int, mode: Mode) -> Probability:
        """The part of each token's divergence from the prior that this step has, nats."""
        return jnp.zeros_like(weight)

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone) -> "HaltingBlock":
        return HaltingBlock(block, self.chooser(backbone), self, backbone)

    def begin(self, x: Float[Array, "B T D"], batch: Batch) -> Halted:
        progress = begin(batch.segments > 0)
        output = jnp.zeros_like(x, jnp.float32)
        return Halted(x=x, output=output, weight=jnp.zeros_like(progress.spent), progress=progress)

    def end(self, x: Halted) -> Float[Array, "B T D"]:
        return x.output.astype(x.x.dtype)

    def halted_flops(self, backbone: Backbone) -> float:
        return 4.0 * backbone.d_model * backbone.kv_heads * backbone.width_of_head if self.visible else 0.0


class Chooser(nnx.Module, abc.ABC):
    """The parameters with which one layer decides."""

    @abc.abstractmethod
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Probability:
        """Of halting, from the state after the layer, float32."""


class HaltingBlock(nnx.Module):
    """A Transformer block that computes on the tokens that are still running."""

    def __init__(self, block: Any, chooser: Chooser, settings: TokenHalting, backbone: Backbone):
        self.block, self.chooser, self.settings = block, chooser, settings
        self.num_layers, self.causal = backbone.num_layers, backbone.causal

    def __call__(self, row: Halted, context: Context, cache: Optional[BlockCache] = None) -> BlockOutput:
        batch, before = context.batch, row.progress
        running_BT = ~before.halted
        seen_BT = batch.segments if self.settings.visible else jnp.where(running_BT, batch.segments, 0)
        compact = self.settings.execution == "compact" and context.mode != "train"
        compute = self._compact if compact else self._masked
        y_BTD, keys = compute(row.x, running_BT, seen_BT, context, cache)
        x_BTD = jnp.where(running_BT[..., None], y_BTD, row.x)
        with jax.named_scope("halt"):
            last = jnp.asarray(context.layer) == self.num_layers - 1
            probability_BT = self.chooser(x_BTD)
            weight_BT, after = self.settings.step(before, probability_BT, last, context.mode)
            output_BTD = row.output + weight_BT[..., None] * x_BTD.astype(jnp.float32)
        halts_BT, where = after.halted & running_BT, (batch.segments, batch.positions)
        prior_BT = self.settings.prior_part(weight_BT, jnp.asarray(context.layer), self.num_layers, context.mode)
        total = lambda values_BT, where_BT: jnp.sum(values_BT, where=where_BT, dtype=jnp.float32)  # noqa: E731
        report = HaltingReport(
            tokens=count(batch.segments > 0),
            running=count(running_BT),
            halting=count(halts_BT),
            weight_sum=total(weight_BT, running_BT),
            remainder_sum=total(after.remainder, halts_BT),
            probability_sum=total(jnp.where(last, 1.0, probability_BT), running_BT),
            prior_sum=total(prior_BT, running_BT),
            keys=jnp.float32(0) if cache is not None else pairs(running_BT, seen_BT > 0, *where, self.causal),
        )
        new = Halted(x=x_BTD, output=output_BTD, weight=weight_BT, progress=after)
        kept_BT = running_BT if context.record else None
        return BlockOutput(x=new, report=Report(halting=report, kept=kept_BT), cache=keys)

    def _masked(self, x_BTD: Array, running_BT: Array, seen_BT: Array, context: Context, cache: Optional[BlockCache]):
        """(the block on all tokens, its cache)."""
        out = self.block(x_BTD, _seeing(context, seen_BT), cache)
        return out.x, out.cache

    def _compact(self, x_BTD: Array, running_BT: Array, seen_BT: Array, context: Context, cache: Optional[BlockCache]):
        """The same for tokens that are running; those that are not may have any state. Caches stay outside of the
        branches, which would copy them."""
        if cache is not None and x_BTD.shape[1] == 1:
            where = {"active": running_BT[:, 0], "skipped_keys": self.settings.visible}
            out = self.block(x_BTD, dataclasses.replace(context, **where), cache)
            return out.x, out.cache
        batch, length, attention = context.batch, x_BTD.shape[1], self.block.attention
        places_BT = batch.positions if batch.places is None else batch.places
        k, v = attention.keys(self.block.attention_norm(x_BTD), batch.positions)
        if cache is None:
            places_BT = jnp.zeros_like(batch.positions) + jnp.arange(length, dtype=jnp.int32)
            memory = KVCache(k=k, v=v, segments=seen_BT)
        else:
            memory = attention.remember(k, v, batch.positions, seen_BT, cache.attention, batch.places)

        def of_room(room: int):
            def run(x_BTD: Array) -> Array:
                token_BS, of_S = self._gathered(room, running_BT, x_BTD, batch.positions, batch.segments, places_BT)
                x_BSD, positions_BS, segments_BS, places_BS = of_S
                y_BSD = self.block.onwards(x_BSD, positions_BS, segments_BS, memory, places_BS, context)
                return on_each_device(lambda *given: (put(*given),), (BY_ROW,) * 3, (BY_ROW,))(x_BTD, y_BSD, token_BS)[
                    0
                ]

            return run

        y_BTD = in_a_room(running_BT, of_room, x_BTD)
        return y_BTD, None if cache is None else BlockCache(attention=memory)

    def _gathered(self, room: int, running_BT: Bool[Array, "B T"], *rows: Array) -> tuple[Array, tuple[Array, ...]]:
        """(which tokens are running, what these rows hold of them)."""

        def local(running_BT: Array, rows: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            token_BS = survivors(running_BT, room)
            return token_BS, tuple(at(array, token_BS) for array in rows)

        return on_each_device(local, (BY_ROW, BY_ROW), (BY_ROW, BY_ROW))(running_BT, rows)


def _seeing(context: Context, seen_BT: Int[Array, "B T"]) -> Context:
    """The context in which only some tokens are seen: to the block the others are padding."""
    batch = dataclasses.replace(context.batch, segments=seen_BT, previous=context.batch.preceding())
    return dataclasses.replace(context, batch=batch)
