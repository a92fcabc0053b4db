"""Layers that compute on chosen tokens: Mixture-of-Depths (Raposo et al., arXiv:2404.02258).

With scores r of the tokens of a row and k = capacity · T, the k best go through the block, which sees no others:
x'_i = x_i + g(r_i) (block(X̃)_i − x_i), and all others stay as they are. Whether a token is among the k best depends
on those after it; what generates decides token by token instead, as `serving` says, and so does evaluation."""

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report, SelectionReport
from sparsejax.base.sharding import BATCH_AXES, on_each_device, zeros_of
from sparsejax.base.structs import struct
from sparsejax.blocks.choosers import Chooser, Gate, Lot, Router, hidden_width
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Hidden, Totals
from sparsejax.blocks.tokens import NOWHERE, ROWS, Tokens, context_at, report_of
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.anchors import at
from sparsejax.ops.selection import best_tokens, members, put


@struct
class Decision:
    """Which tokens of a batch the block computes on."""

    chosen: Bool[Array, "B T"]
    gate: Float[Array, "B T"]
    slots: Optional[Int[Array, "B K"]]  # the chosen tokens, where their number is static


@dataclass(frozen=True, kw_only=True)
class SelectedTokens(Tokens):
    """What all ways to choose k = capacity · T tokens of a row have in common."""

    capacity: float = 0.125  # part of a row's tokens that the block computes on
    blocks: tuple[str, ...] = ()  # names in model.blocks whose layers do so; (): all
    execution: Literal["compact", "masked"] = "compact"  # masked: the same values, all tokens being computed

    def __post_init__(self):
        if not 0 < self.capacity <= 1:
            raise ConfigError("capacity", f"{self.capacity} is no part of a row; allowed: more than 0, to 1")

    def slots(self, length: int) -> int:
        """k, of `length` tokens in a row."""
        return min(length, math.ceil(self.capacity * length))

    def room(self, length: int, cached: bool = False) -> int:
        return length if cached or self.execution == "masked" else self.slots(length)

    def empty_cache(self, rows: int, d_model: int) -> dict[str, Array]:
        return {"written": jnp.zeros(rows, jnp.int32, out_sharding=P(BATCH_AXES))}

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        return {name: cost.every_kth(1 / self.capacity) for name, cost in of_block.items()}

    looks_ahead = False
    """Whether evaluation, too, chooses among all tokens of a row."""


@dataclass(frozen=True, kw_only=True)
class ScoredTokens(SelectedTokens, abc.ABC):
    """Ways with a `Chooser`, which has a causal form of its choice."""

    @abc.abstractmethod
    def chooser(self, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> Chooser:
        """What chooses the tokens of a layer."""

    def around(
        self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]
    ) -> "SelectedBlock":
        return SelectedBlock(block, self.chooser(key, backbone, layers), self)


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(ScoredTokens):
    """A linear router chooses, and learns through the gate. The block runs on the residual stream of the chosen tokens
    and its contribution, without its outer skip connection, is what the gate multiplies."""

    gate: Gate = "raw"  # of the score: 1, itself, its sigmoid, its share of the row's softmax; 1 with σ's gradient
    serving: Literal["predictor", "router", "top_k"] = "predictor"  # in evaluation and generation; top_k looks ahead
    serving_loss: float = 0.01  # weight of the cross entropy that teaches predictor or router what top_k chooses

    def __post_init__(self):
        super().__post_init__()
        if self.serving_loss < 0:
            raise ConfigError("serving_loss", f"{self.serving_loss} is negative")
        if self.serving != "top_k" and self.serving_loss == 0:
            message = f"0 teaches serving={self.serving} nothing; allowed: more than 0, or serving=top_k"
            raise ConfigError("serving_loss", message)
        if self.gate == "softmax" and self.serving != "top_k":
            message = "softmax is over tokens that are not there yet; allowed: other gates, or serving=top_k"
            raise ConfigError("gate", message)

    def unused(self) -> dict[str, str]:
        return {"serving_loss": "serving=top_k needs no lesson"} if self.serving == "top_k" else {}

    @property
    def looks_ahead(self) -> bool:
        return self.serving == "top_k"

    def chooser(self, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> Router:
        return Router(key, backbone.d_model, self.gate, predicts=self.serving == "predictor")

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        hidden = hidden_width(backbone.d_model) if self.serving == "predictor" else 0
        weights = backbone.d_model + hidden * (backbone.d_model + 1)
        return super().costs(of_block, backbone, layers) | {"selection": Cost.of_matrices(weights)}

    def losses(self, report: Report, totals: Totals) -> dict[str, Float[Array, ""]]:
        found = report.selection
        assert found is not None
        return {"selection": self.serving_loss * found.surprise_sum.sum() / jnp.maximum(totals.tokens, 1)}

    def check_cached(self) -> None:
        if self.serving == "top_k":
            message = "top_k chooses among tokens that are not there yet; allowed in generation: predictor, router"
            raise ConfigError("serving", message)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(ScoredTokens):
    """The control: as many tokens, drawn by lot; in evaluation and generation by a hash of layer and position."""

    def chooser(self, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> Lot:
        return Lot(self.capacity)


class SelectedBlock(nnx.Module):
    """A block that runs on the tokens that are chosen for it."""

    def __init__(self, block: nnx.Module, chooser: Chooser, settings: SelectedTokens):
        self.block, self.chooser, self.settings = block, chooser, settings

    def __call__(self, x: Any, context: Context, cache: Optional[BlockCache] = None) -> BlockOutput:
        return self._on_chosen(x, context, cache, context.batch.segments > 0)[0]

    def _on_chosen(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        cache: Optional[BlockCache],
        alive_BT: Bool[Array, "B T"],
    ) -> tuple[BlockOutput, Decision]:
        """Chosen among the tokens that are `alive`."""
        with jax.named_scope("select"):
            decision, report = self._decide(x_BTD, context, alive_BT)
        if decision.slots is not None and self.settings.execution == "compact":
            out = self._compact(x_BTD, decision, context)
        else:
            out = self._masked(x_BTD, decision, context, cache)
        kept_BT = decision.chosen if context.record else None
        return dataclasses.replace(
            out, report=dataclasses.replace(out.report, selection=report, kept=kept_BT)
        ), decision

    def _decide(
        self, x_BTD: Float[Array, "B T D"], context: Context, alive_BT: Bool[Array, "B T"]
    ) -> tuple[Decision, SelectionReport]:
        chooser, valid_BT = self.chooser, context.batch.segments > 0
        scores_BT = chooser.scores(x_BTD, context)
        logits_BT = chooser.causal(x_BTD, scores_BT, context)
        best_BK, best_BT = self._best(scores_BT, alive_BT, context)
        ahead = context.mode == "train" or self.settings.looks_ahead
        chosen_BT = best_BT if ahead else (logits_BT > 0) & alive_BT
        gate_BT = chooser.gate(scores_BT, alive_BT)
        surprise_BT = optax.sigmoid_binary_cross_entropy(logits_BT, best_BT.astype(jnp.float32))
        count = lambda true_BT: true_BT.sum(dtype=jnp.int32)  # noqa: E731
        report = SelectionReport(
            tokens=count(valid_BT),
            chosen=count(chosen_BT),
            agreed=count(valid_BT & (best_BT == ((logits_BT > 0) & alive_BT))),
            gate_sum=jnp.sum(jnp.where(chosen_BT, gate_BT, 0)),
            surprise_sum=jnp.sum(jnp.where(alive_BT, surprise_BT, 0)),
        )
        return Decision(chosen=chosen_BT, gate=gate_BT, slots=best_BK if ahead else None), report

    def _best(
        self, scores_BT: Array, alive_BT: Array, context: Context
    ) -> tuple[Optional[Int[Array, "B K"]], Bool[Array, "B T"]]:
        """The k best of those alive, and which they are."""
        return best_of_rows(scores_BT, alive_BT, self.settings.slots(scores_BT.shape[1]))

    def _compact(self, x_BTD: Float[Array, "B T D"], decision: Decision, context: Context) -> BlockOutput:
        """The block on as many tokens as are chosen."""
        token_BK = decision.slots
        assert token_BK is not None
        gather = on_each_device(lambda x, gate, token: (at(x, token), at(gate, token)), (ROWS,) * 3, (ROWS,) * 2)
        x_BKD, gate_BK = gather(x_BTD, decision.gate, token_BK)
        out = self.block(x_BKD, context_at(context, token_BK), None)
        new_BKD = gated(x_BKD, out.x, gate_BK)
        (new_BTD,) = on_each_device(lambda *given: (put(*given),), (ROWS,) * 3, (ROWS,))(x_BTD, new_BKD, token_BK)
        return dataclasses.replace(out, x=new_BTD, report=report_of(out.report, token_BK, x_BTD.shape[1]))

    def _masked(
        self, x_BTD: Float[Array, "B T D"], decision: Decision, context: Context, cache: Optional[BlockCache]
    ) -> BlockOutput:
        """The block on all tokens, those that are not chosen being padding to it. One token a row is computed only if
        it is chosen in some row."""
        batch, chosen_BT = context.batch, decision.chosen
        places_BT, written_B = None, None
        if cache is not None:
            assert cache.written is not None
            earlier_BT = jnp.cumsum(chosen_BT, axis=1, dtype=jnp.int32) - chosen_BT
            places_BT = jnp.where(chosen_BT, cache.written[:, None] + earlier_BT, NOWHERE)
            written_B = cache.written + chosen_BT.sum(axis=1, dtype=jnp.int32)
            cache = dataclasses.replace(cache, written=None)
        segments_BT = jnp.where(chosen_BT, batch.segments, 0)
        batch = dataclasses.replace(batch, segments=segments_BT, previous=batch.preceding(), places=places_BT)
        run = lambda: self.block(x_BTD, dataclasses.replace(context, batch=batch), cache)  # noqa: E731
        out = run() if cache is None or x_BTD.shape[1] > 1 else _if_any(chosen_BT, run, x_BTD, cache)
        new_BTD = gated(x_BTD, out.x, decision.gate)
        new_BTD = jnp.where(chosen_BT[..., None], new_BTD, x_BTD)
        after = None if out.cache is None else dataclasses.replace(out.cache, written=written_B)
        return dataclasses.replace(out, x=new_BTD, cache=after)


def best_of_rows(scores_BT: Array, alive_BT: Array, k: int) -> tuple[Int[Array, "B K"], Bool[Array, "B T"]]:
    def local(scores_BT: Array, alive_BT: Array) -> tuple[Array, Array]:
        token_BK = best_tokens(scores_BT, alive_BT, k)
        return token_BK, members(token_BK, scores_BT.shape[1])

    run = on_each_device(local, (ROWS, ROWS), (ROWS, ROWS))
    return run(jax.lax.stop_gradient(scores_BT), alive_BT)


def gated(x: Float[Array, "B S D"], y: Hidden, gate: Float[Array, "B S"]) -> Float[Array, "B S D"]:
    """x + gate · (y − x), exactly y where the gate is 1."""
    assert isinstance(y, jax.Array)  # a residual of several streams is around this
    gate = gate[..., None]
    return (gate * y.astype(jnp.float32) + (1 - gate) * x.astype(jnp.float32)).astype(x.dtype)


def _if_any(chosen_BT: Bool[Array, "B T"], run: Callable[[], BlockOutput], x: Array, cache: BlockCache) -> BlockOutput:
    """What the block returns, or its input and empty reports where no row needs it."""
    skipped = dataclasses.replace(zeros_of(run), x=x, cache=cache)
    return jax.lax.cond(chosen_BT.any(), run, lambda: skipped)
