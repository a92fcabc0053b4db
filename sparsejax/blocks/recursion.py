"""Mixture-of-Recursions (Bae et al., arXiv:2507.10524): one block again and again, on fewer and fewer tokens.

The R repeats of a tied block are recursions. In recursion r a router of its own scores the tokens that recursion r − 1
computed on, and the c_r · T best of a row go through the block, which sees no others: the sets are nested, and a token
that is left out keeps its state. c_r falls linearly from 1 to `capacity`, which with capacity = 1 / R are the paper's
R / R … 1 / R. Every recursion has keys and values of its own, of the tokens that it computed on.

Left out are the paper's other two choices: a depth for each token at the start (token choice), and keys and values of
the first recursion for all."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.sharding import on_each_device
from sparsejax.base.structs import Batch
from sparsejax.blocks.choosers import Gate, Lot, Router, hidden_width
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Hidden
from sparsejax.blocks.selection import MixtureOfDepths, RandomTokens, ScoredTokens, SelectedBlock, best_of_rows
from sparsejax.blocks.tokens import ROWS
from sparsejax.nn.backbone import Backbone
from sparsejax.ops.selection import Recursing, among_best


@dataclass(frozen=True, kw_only=True)
class Recursions(ScoredTokens):
    """What both ways to choose have in common. `capacity` is that of the last recursion."""

    capacity: float = 0.3

    def part(self, recursion: int, recursions: int) -> float:
        """c_r, of recursion `recursion`, counted from 0."""
        return 1 - (1 - self.capacity) * recursion / max(recursions - 1, 1)

    def slots_of(self, length: int, recursions: int) -> tuple[int, ...]:
        """k of each recursion, of `length` tokens in a row."""
        parts = [self.part(recursion, recursions) for recursion in range(recursions)]
        return tuple(dataclasses.replace(self, capacity=part).slots(length) for part in parts)

    def room(self, length: int, cached: bool = False) -> int:
        return length  # all recursions have one cache's shape, and the first computes on all tokens

    def entered(self, x: Hidden, batch: Batch) -> Hidden:
        if isinstance(x, Recursing):
            return x
        assert isinstance(x, jax.Array)  # one stream
        return Recursing(x=x, alive=batch.segments > 0)

    def around(
        self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]
    ) -> "RecursiveBlock":
        return RecursiveBlock(block, self.chooser(key, backbone, layers), self, layers)

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        parts = [self.part(recursion, layers) for recursion in range(layers)]
        tokens, pairs = sum(parts) / layers, sum(part**2 for part in parts) / layers
        return {name: cost.of_some(tokens, pairs) for name, cost in of_block.items()}


@dataclass(frozen=True, kw_only=True)
class MixtureOfRecursions(Recursions, MixtureOfDepths):
    """Routers choose (expert choice); gate, serving and its lesson are those of Mixture-of-Depths."""

    gate: Gate = "sigmoid"

    def chooser(self, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> "RouterOfEach":
        predicts = self.serving == "predictor"
        return RouterOfEach(key, backbone.d_model, self.gate, predicts=predicts, layers=layers)

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        hidden = hidden_width(backbone.d_model) if self.serving == "predictor" else 0
        weights = layers * backbone.d_model + hidden * (backbone.d_model + layers)
        return Recursions.costs(self, of_block, backbone, layers) | {"selection": Cost.of_matrices(weights)}


@dataclass(frozen=True, kw_only=True)
class RandomRecursions(Recursions, RandomTokens):
    """The control: as many tokens in every recursion, by one lot for all of them."""

    def chooser(self, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> "LotOfAll":
        parts = tuple(self.part(recursion, len(layers)) for recursion in range(len(layers)))
        return LotOfAll(parts, layers[0])


class RouterOfEach(Router):
    """A router of every recursion; what they predict from has one hidden layer."""

    def __init__(self, key: PRNGKeyArray, width: int, gate: Gate, predicts: bool, layers: tuple[int, ...]):
        super().__init__(key, width, gate, predicts, numbers=len(layers))
        self.first = layers[0]

    def _own(self, numbers_BTN, context):
        return jax.lax.dynamic_index_in_dim(numbers_BTN, context.layer - self.first, 2, keepdims=False)


class LotOfAll(Lot):
    """One lot for a token: recursions choose those that draw high in training, and low in evaluation."""

    def __init__(self, parts: tuple[float, ...], first: int):
        super().__init__(parts[-1])
        self.parts, self.first = parts, first

    def _drawn_for(self, context):
        return self.first, context.step_key

    def causal(self, x_BTD, scores_BT, context):
        return jnp.asarray(self.parts)[context.layer - self.first] - scores_BT


class RecursiveBlock(SelectedBlock):
    """A block that runs on the tokens that are chosen among those that went through it before."""

    settings: Recursions

    def __init__(self, block: nnx.Module, chooser: Any, settings: Recursions, layers: tuple[int, ...]):
        super().__init__(block, chooser, settings)
        self.layers = layers

    def __call__(self, x: Recursing, context: Context, cache: Optional[BlockCache] = None) -> BlockOutput:
        out, decision = self._on_chosen(x.x, context, cache, x.alive)
        assert isinstance(out.x, jax.Array)
        return dataclasses.replace(out, x=Recursing(x=out.x, alive=decision.chosen))

    def _best(
        self, scores_BT: Array, alive_BT: Array, context: Context
    ) -> tuple[Optional[Int[Array, "B K"]], Bool[Array, "B T"]]:
        slots_R = self.settings.slots_of(scores_BT.shape[1], len(self.layers))
        recursion = context.layer - self.layers[0]
        if isinstance(recursion, int):
            return best_of_rows(scores_BT, alive_BT, slots_R[recursion])
        # Under scan, or recomputed: one shape for all recursions.
        k = jnp.asarray(slots_R)[recursion]
        run = on_each_device(lambda scores, alive: (among_best(scores, alive, k),), (ROWS, ROWS), (ROWS,))
        return None, run(jax.lax.stop_gradient(scores_BT), alive_BT)[0]
