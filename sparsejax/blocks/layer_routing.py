"""Layers that each token is routed through or past: D-LLM (Wang et al., NeurIPS 2024).

Before a layer a small network gives the token's log-odds of running it. Training draws by Gumbel noise, with the
gradient of the soft draw, and the loss asks that every token runs the share `target` of its layers; evaluation takes
the likelier of the two. A token that skips a layer leaves no key there. The first tokens of a document run all layers.

What the gate learns is what the layer would do to its own token: to other tokens' attention it is a fact."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.base.reports import Report, SelectionReport
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import BlockCache, BlockOutput, Context, Totals
from sparsejax.blocks.selection import Decision, SelectedBlock, gated
from sparsejax.blocks.tokens import ROWS, Tokens
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear, RMSNorm, param
from sparsejax.ops.gates import GATES, GateEstimator
from sparsejax.ops.skim import in_a_room, pairs, survivors


@dataclass(frozen=True, kw_only=True)
class LayerRouting(Tokens):
    """Layers of the named blocks are run or skipped, token by token; others, such as the first ones, always run."""

    target: float = 0.5  # share of these layers that a token is to run
    coefficient: float = 1.0  # price of the distance from it, per token
    always: int = 2  # first tokens of a document that skip nothing
    hidden: int = 512  # width of the network that decides
    bias: float = 2.0  # of the log-odds of running, at first
    estimator: GateEstimator = choice(GATES, "gumbel")
    blocks: tuple[str, ...] = ()  # names in model.blocks whose layers are routed; (): all
    execution: Literal["compact", "masked"] = "compact"  # of evaluation and generation

    needs_dense = True

    def __post_init__(self):
        if not 0 <= self.target <= 1:
            raise ConfigError("target", f"{self.target} is no share of the layers; allowed: 0 to 1")
        if self.coefficient < 0:
            raise ConfigError("coefficient", f"{self.coefficient} is negative; allowed: 0 or more")
        for name in ("always", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if not self.estimator.binary:
            message = f"{GATES.name_of(self.estimator)} with these settings gives gates between 0 and 1"
            raise ConfigError("estimator", f"{message}; allowed: straight_through, or gumbel with hard=true")

    def unused(self) -> dict[str, str]:
        return {} if self.coefficient else {"target": "coefficient=0: nothing asks for it"}

    def around(
        self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]
    ) -> "RoutedBlock":
        return RoutedBlock(block, LayerRouter(key, backbone, self), self, backbone.causal)

    def empty_cache(self, rows: int, d_model: int) -> dict[str, Array]:
        return {"written": jnp.zeros(rows, jnp.int32, out_sharding=P(BATCH_AXES))}

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        matrices = Cost.of_matrices(self.hidden * (backbone.d_model + 1))
        return of_block | {"selection": matrices + Cost(parameters=self.hidden + 1, active=self.hidden + 1)}

    def scored(self, reports: dict[str, Report], batch: Batch) -> dict[str, Report]:
        found = {where: report.selection for where, report in reports.items() if report.selection is not None}
        gates = [each.gates.reshape(-1, *batch.tokens.shape) for each in found.values() if each.gates is not None]
        layers = sum(len(each) for each in gates)
        ran_BT = sum(each.sum(0) for each in gates) / layers
        far = jnp.sum(jnp.abs(ran_BT - self.target), where=batch.segments > 0)

        def summed(selection: SelectionReport) -> SelectionReport:
            each = jnp.broadcast_to(far / layers, selection.tokens.shape)
            return dataclasses.replace(selection, gates=None, far_sum=each)

        own = {where: dataclasses.replace(reports[where], selection=summed(each)) for where, each in found.items()}
        return {**reports, **own}

    def losses(self, report: Report, totals: Totals) -> dict[str, Float[Array, ""]]:
        found = report.selection
        assert found is not None and found.far_sum is not None
        return {"selection": self.coefficient * found.far_sum.sum() / jnp.maximum(totals.tokens, 1)}


class LayerRouter(nnx.Module):
    """Linear, norm, SiLU, linear to the log-odds of running the layer, in float32."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, settings: LayerRouting):
        d, h, keys = backbone.d_model, settings.hidden, jax.random.split(key)
        into = {"dtype": "float32", "group": "router", "out_spec": P(BATCH_AXES, None, None)}
        self.hidden = Linear(keys[0], "btd,dh->bth", (d, h), ("embed", None), stddev=d**-0.5, **into)
        self.norm = RMSNorm(h, backbone.norm_epsilon)
        self.odds = Linear(keys[1], "bth,ho->bto", (h, 1), (None, None), stddev=h**-0.5, **into)
        self.bias = param(jnp.full((), settings.bias), (), "router")

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        h_BTH = jax.nn.silu(self.norm(self.hidden(x_BTD.astype(jnp.float32))))
        return self.odds(h_BTH)[..., 0] + self.bias[...]


class RoutedBlock(SelectedBlock):
    """A block that runs on the tokens that do not skip it, however many they are."""

    def __init__(self, block: nnx.Module, router: LayerRouter, settings: LayerRouting, causal: bool):
        self.block, self.chooser, self.settings, self.causal = block, router, settings, causal

    def _decide(
        self, x_BTD: Float[Array, "B T D"], context: Context, alive_BT: Bool[Array, "B T"]
    ) -> tuple[Decision, SelectionReport]:
        batch, settings = context.batch, self.settings
        valid_BT, first_BT = alive_BT, batch.positions < settings.always
        odds_BT, keys = self.chooser(x_BTD), None
        if context.mode == "train" and context.key is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(context.key, batch.rows)
        gate_BT = jnp.where(valid_BT, jnp.where(first_BT, 1.0, settings.estimator(odds_BT, keys)), 0.0)
        chosen_BT = gate_BT > 0
        count = lambda true_BT: true_BT.sum(dtype=jnp.int32)  # noqa: E731
        seen = context.mode != "generate"
        report = SelectionReport(
            tokens=count(valid_BT),
            chosen=count(chosen_BT),
            agreed=count(valid_BT & (chosen_BT == (first_BT | (odds_BT > 0)))),
            gate_sum=gate_BT.sum(),
            surprise_sum=jnp.zeros_like(gate_BT).sum(),
            keys=pairs(chosen_BT, chosen_BT, batch.segments, batch.positions, self.causal) if seen else None,
            gates=gate_BT if seen else None,
        )
        return Decision(chosen=chosen_BT, gate=gate_BT, slots=None), report

    def _masked(
        self, x_BTD: Float[Array, "B T D"], decision: Decision, context: Context, cache: Optional[BlockCache]
    ) -> BlockOutput:
        if context.mode == "train":
            return self._soft(x_BTD, decision, context)
        if cache is not None or self.settings.execution == "masked":
            return super()._masked(x_BTD, decision, context, cache)
        return self._in_rooms(x_BTD, decision, context)

    def _soft(self, x_BTD: Float[Array, "B T D"], decision: Decision, context: Context) -> BlockOutput:
        """The block on all tokens, of which those that run it alone are seen: what skipping tokens would become is what
        their gate learns from."""
        seen_BT = jnp.where(decision.chosen, context.batch.segments, 0)
        out = self.block(x_BTD, dataclasses.replace(context, seen=seen_BT), None)
        return dataclasses.replace(out, x=gated(x_BTD, out.x, decision.gate))

    def _in_rooms(self, x_BTD: Float[Array, "B T D"], decision: Decision, context: Context) -> BlockOutput:
        """The block on the tokens that run it, in the smallest room that is large enough for every row."""

        def of_room(room: int) -> Callable[[Array], Any]:
            def run(x_BTD: Array) -> Any:
                places = on_each_device(lambda chosen_BT: (survivors(chosen_BT, room),), (ROWS,), (ROWS,))
                slots_BS = places(decision.chosen)[0]
                return self._compact(x_BTD, dataclasses.replace(decision, slots=slots_BS), context).x

            return run

        return BlockOutput(x=in_a_room(decision.chosen, of_room, x_BTD), report=Report())
