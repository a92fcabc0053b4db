"""The mixture-of-experts block: its config, what it costs, which losses it adds."""

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.ratios import moe_ratios
from sparsejax.base.reports import MoEReport, Report
from sparsejax.blocks.context import Mode, Totals
from sparsejax.blocks.free_experts import FreeExperts
from sparsejax.blocks.moe_layer import MoELayer
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.shared_experts import gate_loss
from sparsejax.blocks.spec import BlockSpec
from sparsejax.blocks.upcycling import Arrays, copied, mixture_of_clusters, mixture_of_copies
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.mlp import Experts, ffn_weights, ffn_width
from sparsejax.ops.capacity import CONVENTIONS, CapacityConvention, Convention, capacity_table
from sparsejax.ops.exchange import Transport
from sparsejax.ops.ffn import Activation
from sparsejax.ops.grouped import Implementation, ragged_dot_cost
from sparsejax.ops.losses import reinforce_sums
from sparsejax.routers.balance import LoadBalance, balance_loss, with_whole_balance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import ExpertThreshold, Quantile
from sparsejax.routers.logits import LOGITS
from sparsejax.routers.overflow import Drop
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.weights import Renormalized, Unit


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
    from_dense: Literal["copies", "clusters"] = "copies"  # what --init-from makes of a dense network: also MoEfication
    shared_gate: Optional[float] = None  # g · routed + (1 − g) · shared, g = sigmoid(x W), of about this mean (CMR)
    shared_gate_coefficient: float = 0.1  # of |mean of g − shared_gate| in the loss
    shared_gate_dropout: float = 0.0  # in training this share of tokens has g = 0
    zero_experts: int = 0  # scored like the others, their output is 0
    copy_experts: int = 0  # … is x
    constant_experts: int = 0  # … is a₁ x + a₂ v with a learned v and (a₁, a₂) = softmax(x W)
    group_size: Optional[int] = (
        None  # tokens routed together; None: one row. Must divide what a device holds of a microbatch
    )
    capacity_factor: float = 1.25  # in training
    eval_capacity_factor: float = 2.0  # in evaluation; generation has a slot for every token
    expert_dropout: float = 0.0  # in training this share of the hidden layers of routed experts is 0
    gating_dropout: float = 0.0  # in training this share of steps goes without the routed experts of all layers, or
    gating_dropout_by: Literal["skip", "stay"] = "skip"  # … (stay) with those that a token's own device has
    capacity_convention: CapacityConvention = "per_choice"
    dispatch: Literal["gather", "einsum", "grouped"] = "gather"  # grouped: dropless
    grouped_matmul: Literal["auto", "slots", "megablox", "ragged_dot"] = "auto"  # auto: megablox on TPU, else slots
    buffer_factor: float = 2.0  # room for dropless rows from other devices, over a device's share of an even load
    # Of dropless rows; auto: all_gather for fewer pairs than experts, else ragged_all_to_all, and all_to_all on CPU.
    exchange: Literal["auto", "all_to_all", "ragged_all_to_all", "all_gather"] = "auto"
    replicated: bool = False  # every device of mesh.expert has all experts, so that nothing is exchanged
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        moved = () if self.grouped("train") else ("slots", "experts")
        return ("attention", *moved) + (("mlp",) if self.shared_experts else ())

    def __post_init__(self):
        for name in ("num_experts", "d_ff", "group_size", "capacity_factor", "eval_capacity_factor", "buffer_factor"):
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
        if self.gating_dropout and self.router.selection.traits.reinforce:
            raise ConfigError("gating_dropout", "a policy learns from every step; allowed: 0")
        if self.gating_dropout_by == "stay":
            self._check_stay()
        if self.shared_gate is not None and not 0 <= self.shared_gate <= 1:
            raise ConfigError("shared_gate", f"{self.shared_gate} is outside [0, 1]; none: no such gate")
        if self.shared_gate is not None and self.mix_shared:
            raise ConfigError("shared_gate", "mix_shared weighs routed and shared experts already; allowed: none")
        if self.shared_gate_coefficient < 0:
            raise ConfigError("shared_gate_coefficient", f"{self.shared_gate_coefficient} is negative")
        for name in ("expert_dropout", "gating_dropout", "shared_gate_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is outside [0, 1)")
        if self.expert_dropout and self.grouped("train"):
            raise ConfigError(
                "expert_dropout",
                "hidden layers drop nothing where rows are computed expert by expert; allowed: 0, or dispatch=gather "
                "with experts that tokens choose",
            )

        if self.from_dense == "clusters" and not (isinstance(self.router.weight, Unit) and self.router.learned):
            raise ConfigError("from_dense", "clusters add up to one network; it goes with router.weight=unit")
        if self.free.total and not isinstance(self.router.overflow, Drop):
            raise ConfigError("router.overflow", "experts without a network are not sent on to; allowed: overflow=drop")
        balance = self.router.balance
        if self.free.total and isinstance(balance, LoadBalance) and balance.expert_groups is not None:
            raise ConfigError(
                "router.balance.expert_groups", "an expert without a network is in no group; allowed: none"
            )

    def _check_stay(self) -> None:
        """Raises `ConfigError` unless tokens can choose among some of the experts, and these be on their device."""
        traits = self.router.selection.traits
        if traits.fixed or traits.fits or traits.train_only or traits.together or traits.thresholds or traits.parts > 1:
            kind = SELECTORS.name_of(self.router.selection)
            fit = "top_k, second_expert, top_p, positive"
            raise ConfigError("gating_dropout_by", f"stay is for tokens that rank experts, not {kind}; allowed: {fit}")
        if self.replicated:
            raise ConfigError("gating_dropout_by", "stay, but every device has all replicated experts; allowed: skip")
        if self.expert_dropout:
            raise ConfigError("gating_dropout_by", "tokens that stay take no slots; with expert_dropout allowed: skip")

    def check_causal(self) -> None:
        try:
            self.router.check_causal()
        except ConfigError as error:
            raise error.below("router") from None

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
    def gates_shared(self) -> bool:
        return self.shared_gate is not None and self.shared_experts > 0

    @property
    def scored_experts(self) -> int:
        """Columns of the router."""
        return self.num_experts + self.free.total

    @property
    def dropless(self) -> bool:
        return self.dispatch == "grouped"

    def implementation(self, platform: str) -> Implementation:
        """What multiplies the rows of `dispatch = grouped`."""
        if self.grouped_matmul != "auto":
            return self.grouped_matmul
        return "megablox" if platform == "tpu" else "slots"

    def exchanges(self, expert_axis: int) -> bool:
        """Whether tokens travel to their experts, which so many devices share out."""
        return expert_axis > 1 and not self.replicated

    def gathers(self, tokens: Optional[int] = None) -> bool:
        """Whether dropless rows travel as tokens that every device gets, of devices that hold so many; None: many."""
        few = tokens is not None and tokens * self.experts_per_token < self.num_experts
        return self.exchange == "all_gather" or (self.exchange == "auto" and few)

    def transport(self, platform: str, tokens: Optional[int] = None) -> Transport | Literal["all_gather"]:
        """What moves dropless rows between devices that hold so many tokens each; None: many."""
        if self.gathers(tokens):
            return "all_gather"
        if self.exchange != "auto":
            return self.exchange
        return "all_to_all" if platform == "cpu" else "ragged_all_to_all"

    @property
    def has_router(self) -> bool:
        return True

    @property
    def hands_on(self) -> int:
        return self.scored_experts if self.router.residual else 0

    @property
    def counts_first(self) -> bool:
        return self.router.balance.scope == "global" or self.gates_shared

    def factor(self, mode: Mode) -> float:
        """The capacity factor asked for; where whole groups go to the same experts, without a capacity and in
        generation, the one that stands for a slot for every token."""
        if self.room_for_all(mode):
            return self.scored_experts / (self.experts_per_token if self._convention.counts_k else 1)
        return self.capacity_factor if self.slots_of_training(mode) else self.eval_capacity_factor

    def room_for_all(self, mode: Mode) -> bool:
        traits = self.router.selection.traits
        return mode == "generate" or traits.together or (self.dropless and not traits.fits)

    def grouped(self, mode: Mode) -> bool:
        """Whether rows are sorted and computed expert by expert, as many as there are: with dispatch=grouped, and
        where a slot for every token would be E/k times the work."""
        return self.dropless or self.room_for_all(mode)

    def slots_of_training(self, mode: Mode) -> bool:
        return mode == "train" or self.router.selection.traits.fits

    @property
    def _convention(self) -> Convention:
        return CONVENTIONS[self.capacity_convention]

    def unused(self) -> dict[str, str]:
        reasons = {} if self.dropless else {"buffer_factor": f"dispatch={self.dispatch}; it counts with grouped"}
        if self.exchange == "all_gather":
            reasons["buffer_factor"] = "exchange=all_gather has room for everyone's pairs"
        if self.replicated:
            reasons |= dict.fromkeys(("exchange", "buffer_factor"), "replicated experts need no exchange")
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
        nothing_drops = self.dropless or traits.fits or traits.together
        if nothing_drops and isinstance(self.router.weight, Renormalized):
            reasons["router.weight.drop"] = "nothing is dropped, before or after"
        by_group = not traits.causal or isinstance(self.router.controller, (Quantile, ExpertThreshold))
        if self.dropless and not by_group:
            reasons["group_size"] = "dispatch=grouped drops nothing, and no choice is one of a whole group"
        if not self.free.total and isinstance(self.router.balance, LoadBalance):
            reasons["router.balance.free_weight"] = "there are no zero_experts, copy_experts or constant_experts"
        if not self.gating_dropout:
            reasons["gating_dropout_by"] = "gating_dropout=0 drops no step"
        if not self.shared_experts:
            reasons |= dict.fromkeys(("mix_shared", "shared_gate"), "there are no shared_experts")
        if not self.gates_shared:
            names = ("shared_gate_coefficient", "shared_gate_dropout")
            reasons |= dict.fromkeys(names, "there is no shared_gate, or no shared_experts")
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
        kind = {"gated": self.gated, "activation": self.activation, "replicated": self.replicated}
        return Experts(key, backbone, self.num_experts, d_ff, **kind)

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
        mixing = (2 if self.mixes else 1 if self.gates_shared else 0) * backbone.d_model
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

    def check_rows_apart(self, length: int, expert_axis: int) -> None:
        if self.group_size is not None and length % self.group_size:
            message = f"{self.group_size}: a group may hold tokens of several rows of {length}"
            raise ConfigError("group_size", f"{message}; allowed: None, or what divides {length}")
        if self.grouped("eval") and self.exchanges(expert_axis) and self.exchange != "all_gather":
            message = f"{self.exchange}: rows compete for the room of dropless pairs from other devices"
            raise ConfigError("exchange", f"{message}; allowed: all_gather, or mesh.expert=1")

    def processed_flops(self, report: Report, backbone: Backbone) -> float:
        return float(_moe(report).processed[: self.num_experts].sum()) * self.pair_flops(backbone)

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        width = {"d_ff": (ffn_width(backbone, self.d_ff), "mlp")}
        return width if self.replicated else width | {"num_experts": (self.num_experts, "experts")}

    def decided_for(self, platform: str, expert_devices: int) -> list[str]:
        kind = self.implementation(platform)
        if kind == "megablox" and platform != "tpu":
            message = f"'megablox' is a kernel for TPU and this is a {platform}; allowed here: auto, slots, ragged_dot"
            raise ConfigError("grouped_matmul", message)
        cost = ragged_dot_cost() if kind == "ragged_dot" else 1.0
        if self.transport(platform) == "ragged_all_to_all" and platform == "cpu":
            allowed = "auto, all_to_all, all_gather"
            raise ConfigError("exchange", f"XLA has no 'ragged_all_to_all' for cpu; allowed here: {allowed}")
        if cost is None:
            dense = ", whose FLOPs this compiler does not tell"
        else:
            dense = f", compiled here to dense products: {cost:.1f} times the FLOPs of the pairs" if cost > 1.5 else ""
        moved = f"; rows exchanged by {self.transport(platform)}" if self.exchanges(expert_devices) else ""
        told = [f"grouped products by {kind}{dense}{moved}"]
        return told if self.grouped("train") else []

    def check_cached(self) -> None:
        if self.router.logits.traits.whole:
            name = LOGITS.name_of(self.router.logits)
            lacks = f"{name} needs the vectors of the whole document, which generation lacks"
            raise ConfigError("router.logits", f"{lacks}; such a model can be trained and evaluated")

    def check_some_tokens(self) -> None:
        if self.router.selection.traits.reinforce:
            raise ConfigError("", "its policy is rewarded with the loss of every token")

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
        balance = balance_loss(moe, self.router.balance, k, totals.rows, totals.microbatches, counted=all_pairs)
        z = moe.z_sum / jnp.maximum(totals.tokens, 1)
        # Nothing presses on a table, nor on a router without parameters.
        balance = jnp.zeros_like(balance) if self.router.selection.traits.fixed else balance
        z_loss = self.router.z_loss if self.router.learned else 0.0
        terms = {"balance": balance, "router_z": z_loss * z.sum()}
        pressure, reinforce = self.router.controller.loss(moe, totals.tokens, k), self.router.selection.traits.reinforce
        terms |= {} if pressure is None else {"sparsity": pressure}
        if self.gates_shared and self.shared_gate is not None:
            whole = moe if all_pairs is None else all_pairs
            terms["shared_gate"] = self.shared_gate_coefficient * gate_loss(moe, whole, self.shared_gate)
        return terms | (reinforce.losses(moe, totals.targets, totals.tokens) if reinforce else {})

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        moe = _moe(report)
        ratios = moe_ratios(moe, self.experts_per_token, self.free.total)
        if moe.gate_sum is not None and moe.gated is not None:
            ratios["moe/shared_gate"] = float(moe.gate_sum) / max(int(moe.gated), 1)
        return ratios | {"moe/capacity_factor": self.factor(mode)}

    def next_state(self, state: Float[Array, "*R N E"], report: Report) -> Float[Array, "*R N E"]:
        return self.router.controller.update(state, _moe(report), self.experts_per_token, self.free.total)

    def of_beginning(self) -> dict[str, Any]:
        return {} if self.from_dense == "copies" else {"from_dense": self.from_dense}

    def continued(self, fresh: Arrays, trained: Arrays, before: BlockSpec) -> dict[str, Array]:
        """From a dense block, a mixture of copies."""
        alike = any(name.startswith("feed_forward/experts/") for name in trained)
        if alike:
            return copied(fresh, trained)
        if self.from_dense == "clusters":
            return mixture_of_clusters(fresh, trained)
        return mixture_of_copies(fresh, trained, self.router, self.scored_experts)

    def check_replay(self, expert: int) -> None:
        if expert >= self.scored_experts:
            raise ConfigError("num_experts", f"{self.scored_experts}, but a recorded token went to expert {expert}")

    def settle(self, report: Report) -> Report:
        """A global balance is that of the summed loads."""
        if self.router.balance.scope != "global":
            return report
        moe = with_whole_balance(_moe(report), self.router.balance, self.experts_per_token)
        return dataclasses.replace(report, moe=moe)


def _moe(report: Report) -> MoEReport:
    assert report.moe is not None  # a block of this kind always has one
    return report.moe
