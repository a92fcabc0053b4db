"""The mixture-of-experts block: route, dispatch, exchange, compute, combine."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport, Report, moe_ratios
from sparsejax.base.sharding import (
    BATCH_AXES,
    MeshConfig,
    gather_for_compute,
    mesh_platform,
    on_each_device,
    split_axes,
    sum_over,
)
from sparsejax.base.structs import struct
from sparsejax.blocks.context import Context, Mode, Totals
from sparsejax.blocks.expert_parallel import expert_parallel, whole_weights
from sparsejax.blocks.free_experts import FreeExperts, free_output
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.spec import BlockSpec, Cost
from sparsejax.blocks.upcycling import Arrays, copied, mixture_of_copies
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear
from sparsejax.nn.mlp import MLP, Experts, ffn_weights, ffn_width
from sparsejax.ops.capacity import CONVENTIONS, CapacityConvention, Convention, capacity_table
from sparsejax.ops.dispatch import MOVEMENTS
from sparsejax.ops.ffn import Activation
from sparsejax.ops.grouped import Implementation, grouped_experts
from sparsejax.ops.losses import reinforce_sums
from sparsejax.routers.balance import balance_loss, with_local_balance, with_whole_balance
from sparsejax.routers.candidates import Inputs, Noise
from sparsejax.routers.exploration import mask_outputs
from sparsejax.routers.logits import Parameters
from sparsejax.routers.lots import Lots, draw_lots
from sparsejax.routers.overflow import Drop
from sparsejax.routers.replay import record
from sparsejax.routers.router import Decision, RouterConfig, report, route


@dataclass(frozen=True, kw_only=True)
class MoESpec(BlockSpec):
    """Config of a mixture-of-experts block."""

    num_experts: int = 8
    d_ff: Optional[int] = None  # hidden width of one expert; None: 4 · d_model
    gated: bool = False
    activation: Activation = "gelu"
    pooled: bool = False  # one pool of experts for all layers of this block, each with its own router
    shared_experts: int = 0  # experts of the same width that every token also goes through, fused into one network
    mix_shared: bool = False  # c₁ · routed + c₂ · shared with (c₁, c₂) = softmax(x W), learned (PR-MoE); else their sum
    zero_experts: int = 0  # scored like the others, their output is 0
    copy_experts: int = 0  # … is x
    constant_experts: int = 0  # … is a₁ x + a₂ v with a learned v and (a₁, a₂) = softmax(x W)
    group_size: Optional[int] = (
        None  # tokens routed together; None: one row. Must divide what a device holds of a microbatch
    )
    capacity_factor: float = 1.25  # in training
    eval_capacity_factor: float = 2.0  # in evaluation; generation has a slot for every token
    gating_dropout: float = 0.0  # in training this share of steps goes without the routed experts of all layers
    capacity_convention: CapacityConvention = "per_choice"
    dispatch: Literal["gather", "einsum", "grouped"] = "gather"  # grouped: dropless
    grouped_matmul: Literal["auto", "slots", "megablox", "ragged_dot"] = "auto"  # auto: megablox on TPU, else slots
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        moved = () if self.dropless else ("slots", "experts")
        return ("attention", *moved) + (("mlp",) if self.shared_experts else ())

    def __post_init__(self):
        for name in ("num_experts", "d_ff", "group_size", "capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(name, f"{value} is not positive")
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) == math.inf:
                raise ConfigError(
                    name, f"inf is no number of slots; num_experts={self.num_experts} is room for any routing"
                )
        for name in ("shared_experts", "zero_experts", "copy_experts", "constant_experts"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"{getattr(self, name)} is negative")
        try:
            self.router.check(self.scored_experts)
        except ConfigError as error:
            raise error.below("router") from None
        if not 0 <= self.gating_dropout < 1:
            raise ConfigError("gating_dropout", f"{self.gating_dropout} is outside [0, 1)")

        if self.free.total and not isinstance(self.router.overflow, Drop):
            raise ConfigError("router.overflow", "experts without a network are not sent on to; allowed: overflow=drop")

    @property
    def experts_per_token(self) -> int:
        return self.router.selection.experts_per_token

    @property
    def free(self) -> FreeExperts:
        return FreeExperts(zero=self.zero_experts, copy=self.copy_experts, constant=self.constant_experts)

    @property
    def mixes(self) -> bool:
        return self.mix_shared and self.shared_experts > 0

    @property
    def scored_experts(self) -> int:
        """Columns of the router."""
        return self.num_experts + self.free.total

    @property
    def dropless(self) -> bool:
        return self.dispatch == "grouped"

    @property
    def implementation(self) -> Implementation:
        """What multiplies the rows of `dispatch = grouped` on the devices of the mesh in force."""
        if self.grouped_matmul != "auto":
            return self.grouped_matmul
        return "megablox" if mesh_platform() == "tpu" else "slots"

    @property
    def has_router(self) -> bool:
        return True

    @property
    def counts_first(self) -> bool:
        return self.router.balance.scope == "global"

    def factor(self, mode: Mode) -> float:
        """The capacity factor asked for; where whole groups go to the same experts, without a capacity and in
        generation, the one that stands for a slot for every token."""
        if self._room_for_all(mode):
            return self.scored_experts / (self.experts_per_token if self._convention.counts_k else 1)
        return self.capacity_factor if self.slots_of_training(mode) else self.eval_capacity_factor

    def _room_for_all(self, mode: Mode) -> bool:
        traits = self.router.selection.traits
        return mode == "generate" or traits.together or (self.dropless and not traits.fits)

    def slots_of_training(self, mode: Mode) -> bool:
        return mode == "train" or self.router.selection.traits.fits

    @property
    def _convention(self) -> Convention:
        return CONVENTIONS[self.capacity_convention]

    def unused(self) -> dict[str, str]:
        reasons = {} if self.dropless else {"grouped_matmul": f"dispatch={self.dispatch}; it counts with grouped"}
        if not self._convention.reads_factor(self.experts_per_token):
            fixed = f"{self.capacity_convention} has a fixed number of slots for k = {self.experts_per_token}"
            reasons["capacity_factor"] = fixed
        if self._convention.evaluation is not None:
            reasons["eval_capacity_factor"] = f"{self.capacity_convention} has a fixed number of slots in evaluation"
        traits, names = self.router.selection.traits, ("capacity_factor", "eval_capacity_factor", "capacity_convention")
        if traits.fits:
            reasons["eval_capacity_factor"] = "slots are the selection, so evaluation has those of training"
        elif self.dropless:
            names += ("router.order", "router.overflow")
            reasons |= dict.fromkeys(names, "dispatch=grouped drops nothing, so there is no capacity")
        elif traits.together:
            reasons |= dict.fromkeys(names, "whole groups go to the same experts, which have a slot for every token")
        if not self.shared_experts:
            reasons["mix_shared"] = "there are no shared_experts"
        return reasons

    def capacities(self, group_size: int, mode: Mode) -> np.ndarray:
        """Slots per expert for a group with 0 … `group_size` unmasked tokens, int32."""
        if mode == "generate" or self.router.selection.traits.together:
            return np.arange(group_size + 1, dtype=np.int32)
        trained = self.slots_of_training(mode)
        shape = group_size, self.scored_experts, self.experts_per_token
        return capacity_table(*shape, self.factor(mode), self.capacity_convention, trained)

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> TransformerBlock:
        attention_key, moe_key = jax.random.split(key)
        return TransformerBlock(attention_key, backbone, MoELayer(moe_key, backbone, self))

    def build_pool(self, key: PRNGKeyArray, backbone: Backbone) -> Optional[Experts]:
        """The experts, when layers share them (routing networks, Rosenbaum et al., arXiv:1711.01239)."""
        return self.build_experts(key, backbone) if self.pooled else None

    def build_experts(self, key: PRNGKeyArray, backbone: Backbone) -> Experts:
        d_ff = ffn_width(backbone, self.d_ff)
        return Experts(key, backbone, self.num_experts, d_ff, gated=self.gated, activation=self.activation)

    def pool_costs(self, backbone: Backbone, layers: int) -> dict[str, Cost]:
        if not self.pooled:
            return {}
        weights = ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)
        met = min(layers * self.experts_per_token, self.num_experts)  # at most, when no two layers choose the same
        return {"experts": Cost(parameters=self.num_experts * weights, active=met * weights)}

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        weights = ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)
        # Pairs of a token that meet a network when all experts have the same load.
        pairs = Fraction(self.experts_per_token * self.num_experts, self.scored_experts)
        parameters, products = self.router.size(backbone.d_model, self.scored_experts)
        constants, of_constants = self.free.size(backbone.d_model)
        mixing = 2 * backbone.d_model if self.mixes else 0
        own = 0 if self.pooled else 1  # a pool's parameters are counted once, by `pool_costs`
        costs = {
            "router": Cost(parameters=parameters, active=parameters, per_token=2 * products),
            "experts": Cost(
                parameters=own * self.num_experts * weights,
                active=own * round(pairs * weights),
                routed=round(pairs * self.pair_flops(backbone)),
            ),
            "constant_experts": Cost(parameters=constants, active=constants, per_token=2 * of_constants),
            "shared_experts": Cost.of_matrices(self.shared_experts * weights + mixing),
        }
        return {name: cost for name, cost in costs.items() if cost.parameters or cost.routed}

    def pair_flops(self, backbone: Backbone) -> int:
        """FLOPs of one expert on one token."""
        return 2 * ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated)

    def processed_flops(self, report: Report, backbone: Backbone) -> float:
        return float(_moe(report).processed[: self.num_experts].sum()) * self.pair_flops(backbone)

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        return {"d_ff": (ffn_width(backbone, self.d_ff), "mlp"), "num_experts": (self.num_experts, "experts")}

    def check_mesh(self, mesh: MeshConfig) -> None:
        if self.dropless and mesh.expert > 1:
            raise ConfigError(
                "dispatch",
                f"grouped needs all experts on each device, and mesh.expert={mesh.expert}; allowed: mesh.expert=1, or "
                "dispatch=gather",
            )

    def check_tokens(self, tokens: int) -> None:
        size = self.group_size
        if size is not None and tokens % size:
            fits = sorted((n for n in range(1, tokens + 1) if tokens % n == 0), key=lambda n: abs(n - size))
            raise ConfigError(
                "group_size",
                f"{size} does not divide the {tokens} tokens that one device holds of a microbatch; "
                f"sizes that fit: {', '.join(map(str, sorted(fits[:6])))}",
            )

    def reward(self, report: Report, reward_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Report:
        moe = _moe(report)
        if moe.choices is None:
            return report
        policy, baseline = reinforce_sums(moe.choices.log_probability, moe.choices.baseline, reward_BT, mask_BT)
        moe = dataclasses.replace(moe, choices=None, policy_sum=policy, baseline_sum=baseline)
        return dataclasses.replace(report, moe=moe)

    def losses(self, report: Report, totals: Totals, counted: Optional[Report]) -> dict[str, Float[Array, ""]]:
        """Balance, z-loss, that of a controller and those of a policy, if there are such: coefficient · the layer's
        value, summed over the layers stacked in `report`."""
        moe, k = _moe(report), self.experts_per_token
        all_pairs = None if counted is None else _moe(counted)
        balance = balance_loss(
            moe, self.router.balance, k, totals.tokens, totals.rows, totals.microbatches, counted=all_pairs
        )
        z = moe.z_sum / jnp.maximum(totals.tokens, 1)
        # Nothing presses on a table, nor on a router without parameters.
        balance = jnp.zeros_like(balance) if self.router.selection.traits.fixed else balance
        z_loss = self.router.z_loss if self.router.learned else 0.0
        terms = {"balance": balance, "router_z": z_loss * z.sum()}
        pressure, reinforce = self.router.controller.loss(moe, totals.tokens, k), self.router.selection.traits.reinforce
        terms |= {} if pressure is None else {"sparsity": pressure}
        return terms | (reinforce.losses(moe, totals.targets, totals.tokens) if reinforce else {})

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        ratios = moe_ratios(_moe(report), self.experts_per_token, self.free.total)
        return ratios | {"moe/capacity_factor": self.factor(mode)}

    def next_state(self, state: Float[Array, "*R N E"], report: Report) -> Float[Array, "*R N E"]:
        return self.router.controller.update(state, _moe(report), self.experts_per_token, self.free.total)

    def continued(self, fresh: Arrays, trained: Arrays) -> dict[str, Array]:
        """From a dense block, a mixture of copies."""
        alike = any(name.startswith("feed_forward/experts/") for name in trained)
        return copied(fresh, trained) if alike else mixture_of_copies(fresh, trained, self.router)

    def check_replay(self, expert: int) -> None:
        if expert >= self.scored_experts:
            raise ConfigError("num_experts", f"{self.scored_experts}, but a recorded token went to expert {expert}")
        if self.router.selection.traits.own_scores:
            raise ConfigError(
                "router.selection", "its weights know more than who was chosen, so that decisions cannot be taken again"
            )

    def settle(self, report: Report) -> Report:
        """A global balance is that of the summed loads."""
        if self.router.balance.scope != "global":
            return report
        moe = with_whole_balance(_moe(report), self.router.balance, self.experts_per_token)
        return dataclasses.replace(report, moe=moe)


def _moe(report: Report) -> MoEReport:
    assert report.moe is not None  # a block of this kind always has one
    return report.moe


class BalancingState(nnx.Variable):
    """What a balance controller knows, float32 `[N, E]`. Read in the forward pass and moved once per optimizer step."""


@struct
class Routing:
    """What the router is given beside the tokens' vectors: fields of the batch, keys, its parameters and state."""

    mask: Bool[Array, "B T"]
    tokens: Int[Array, "B T"]
    previous: Int[Array, "B T"]
    domains: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    keys: Optional[PRNGKeyArray]  # [B]
    lots: Optional[Lots]  # [B, T]
    parameters: Parameters
    constants: Parameters
    state: Optional[Float[Array, "N E"]]
    experts: Optional[Int[Array, "B T K"]]  # decisions to be taken again


class MoELayer(nnx.Module):
    """Router, experts and shared experts. Tokens are exchanged over the mesh axis `expert` inside one `shard_map`."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, spec: MoESpec):
        router_key, expert_key, shared_key, constant_key, mixing_key = jax.random.split(key, 5)
        self.router = nnx.Dict(spec.router.init(router_key, backbone.d_model, spec.scored_experts))
        rows = spec.router.controller.rows
        zeros = jnp.zeros((rows, spec.scored_experts), jnp.float32)
        self.controller = BalancingState(zeros, axes=(None, None)) if rows else None
        d_ff, kind = ffn_width(backbone, spec.d_ff), {"gated": spec.gated, "activation": spec.activation}
        self.experts = None if spec.pooled else spec.build_experts(expert_key, backbone)
        self.constants = nnx.Dict(spec.free.init(constant_key, backbone))
        shared = spec.shared_experts
        self.shared = MLP(shared_key, backbone, shared * d_ff, **kind) if shared else None
        self.shared_mixing = _mixing(mixing_key, backbone.d_model) if spec.mixes else None
        self.spec = spec

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], MoEReport]:
        spec, batch = self.spec, context.batch
        experts = context.pool if self.experts is None else self.experts
        assert isinstance(experts, Experts)  # a pooled layer is run by what holds the pool
        weights = experts.weights()
        weight_specs = tuple(split_axes(weight) for weight in weights)
        routing = Routing(
            mask=batch.segments > 0,
            tokens=batch.tokens,
            previous=batch.preceding(),
            domains=batch.domains,
            positions=batch.positions,
            keys=_row_keys(context) if spec.router.needs_noise else None,
            lots=_lots(context) if "lots" in spec.router.selection.traits.needs else None,
            parameters={name: gather_for_compute(parameter[...]) for name, parameter in self.router.items()},
            constants={name: gather_for_compute(parameter[...]) for name, parameter in self.constants.items()},
            state=None if self.controller is None else self.controller[...],
            experts=context.experts,
        )

        def local(x_BTD, routing, *weights):
            return _routed(x_BTD, routing, weights, weight_specs, spec, context, experts.activation)

        by_row: Any = P(BATCH_AXES)
        whole: Any = P()
        names = ("mask", "tokens", "previous", "domains", "positions", "keys", "lots", "experts")
        rows: Any = dict.fromkeys(names, by_row)
        specs = Routing(**rows, parameters=whole, constants=whole, state=whole)
        rows_spec = P(BATCH_AXES, None, None)
        # Pallas calls carry no varying-axes types.
        typed = not (spec.dropless and spec.implementation == "megablox")
        run = on_each_device(local, (rows_spec, specs, *weight_specs), (rows_spec, P(), by_row), check_vma=typed)
        compute = functools.partial(run, x_BTD.astype(experts.dtype), routing, *weights)
        y_BTD, moe, (decisions, choices) = _now_and_then(compute, spec.gating_dropout, context)
        if spec.router.balance.scope in ("microbatch", "global"):
            moe = with_whole_balance(moe, spec.router.balance, spec.experts_per_token)
        moe = dataclasses.replace(moe, decisions=decisions, choices=choices)
        if self.shared is None:
            return y_BTD, moe
        shared_BTD = checkpoint_name(self.shared(x_BTD), "mlp")
        if self.shared_mixing is None:
            return y_BTD + shared_BTD, moe
        c_BT2 = jax.nn.softmax(self.shared_mixing(x_BTD), axis=-1).astype(y_BTD.dtype)
        return c_BT2[..., :1] * y_BTD + c_BT2[..., 1:] * shared_BTD, moe


def _mixing(key: PRNGKeyArray, d_model: int) -> Linear:
    """A token's logits of the routed and of the shared experts (PR-MoE, arXiv:2201.05596, as in DeepSpeed)."""
    sharing = {"out_spec": P(BATCH_AXES, None, None), "dtype": "float32"}
    return Linear(key, "btd,dc->btc", (d_model, 2), ("embed", None), stddev=d_model**-0.5, **sharing)


def _now_and_then(compute: Callable[[], Any], dropout: float, context: Context) -> Any:
    """`compute()`, or with probability `dropout` zeros of its shape, without computing or communicating anything
    (Gate-Expert-Drop, arXiv:2205.14336). One coin a step for all layers, microbatches and devices; none is tossed
    outside training."""
    key = context.key if context.step_key is None else context.step_key
    if key is None or dropout == 0:
        return compute()
    like = jax.eval_shape(compute)
    nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), like)  # noqa: E731
    return jax.lax.cond(jax.random.bernoulli(key, dropout), nothing, compute)


def _row_keys(context: Context) -> Optional[Array]:
    """A key for each row of the batch, from its number in the step's global batch."""
    if context.key is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(context.key, context.batch.rows)


def _lots(context: Context) -> Lots:
    """Drawn anew by every step of training; always the same at the same depth outside it."""
    number = context.layer if context.key is None else jax.random.bits(context.key, dtype=jnp.uint32)
    return draw_lots(context.batch, jnp.asarray(number))


def _routed(x_BTD, routing: Routing, weights, weight_specs, spec: MoESpec, context: Context, activation: Activation):
    """What one device does for its rows: all experts' slots for its tokens, its experts for everyone's slots."""
    rows, length, _ = x_BTD.shape
    mode = context.mode
    groups, size = _groups(rows, length, spec, mode)
    x_GSD, mask_GS = x_BTD.reshape(groups, size, -1), routing.mask.reshape(groups, size)
    with jax.named_scope("route"):
        keys_B, capacities = routing.keys, spec.capacities(size, mode)
        noise = None if keys_B is None else Noise(keys_B=keys_B, row_length=length, groups=(groups, size))
        inputs = Inputs(
            mask=mask_GS,
            tokens=routing.tokens.reshape(groups, size),
            previous=routing.previous.reshape(groups, size),
            domains=routing.domains.reshape(groups, size),
            positions=routing.positions.reshape(groups, size),
            limit=jnp.asarray(capacities)[mask_GS.sum(-1, dtype=jnp.int32)],
            num_slots=int(capacities[-1]),
            training=mode == "train",
            generating=mode == "generate",
            dropless=spec.dropless,
            free=spec.free.total,
            noise=noise,
            experts=None if routing.experts is None else routing.experts.reshape(groups, size, -1),
            lots=jax.tree.map(lambda lots_BT: lots_BT.reshape(groups, size), routing.lots),
        )
        decision = route(x_GSD, routing.parameters, inputs, spec.router, spec.scored_experts, routing.state)
    moe = report(decision, mask_GS)
    if spec.dropless:
        weights = whole_weights(weights, weight_specs)
        with jax.named_scope("experts"):
            y, rows, in_blocks = grouped_experts(
                x_GSD.reshape(groups * size, -1),
                weights,
                decision.pairs,
                decision.slots,
                activation,
                spec.implementation,
            )
        moe = dataclasses.replace(moe, slots=rows, block_rows=in_blocks)
    else:
        y = _through_slots(x_GSD, decision, weights, weight_specs, spec, activation)
    if "tensor" in weight_specs[0]:
        with jax.named_scope("combine"):
            y = sum_over(y, "tensor")
    y = y.reshape(x_GSD.shape)
    if spec.free.copy or spec.free.constant:
        y = y + free_output(x_GSD, decision.pairs, spec.num_experts, spec.free, routing.constants)
    y = mask_outputs(y, noise, spec.router.output_masking)
    k, p_GSE = spec.experts_per_token, decision.probabilities_GSE
    chosen = dataclasses.replace(decision.pairs, expert=decision.chosen_GP)
    measured, balance = decision.measured_GSNE, spec.router.balance
    moe = with_local_balance(moe, chosen, p_GSE, routing.mask, balance, k, measured)
    decisions = record(decision, x_BTD.shape[0]) if context.record else None
    choices = jax.tree.map(lambda values_GS: values_GS.reshape(routing.mask.shape), decision.choices)
    return y.reshape(x_BTD.shape), sum_over(moe, BATCH_AXES), (decisions, choices)


def _through_slots(x_GSD, decision: Decision, weights, weight_specs, spec: MoESpec, activation: Activation):
    movement = MOVEMENTS[spec.dispatch]
    with jax.named_scope("dispatch"):
        z_EGCD = checkpoint_name(movement.dispatch(x_GSD, decision.pairs, decision.slots), "slots")
    out_EGCD = expert_parallel(z_EGCD, weights, weight_specs, activation)
    with jax.named_scope("combine"):
        return movement.combine(checkpoint_name(out_EGCD, "experts"), decision.pairs, decision.slots)


def _groups(rows: int, length: int, spec: MoESpec, mode: Mode) -> tuple[int, int]:
    """(G, S) of the tokens on one device."""
    if mode == "generate":
        return (rows, length) if length > 1 else (1, rows)
    size = length if spec.group_size is None else spec.group_size
    return rows * length // size, size
