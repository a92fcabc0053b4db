"""The mixture-of-experts layer: route, dispatch, exchange, compute, combine."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.reports import ExchangeReport, MoEReport, demand_of
from sparsejax.base.sharding import (
    BATCH_AXES,
    mesh_platform,
    on_each_device,
    split_axes,
    sum_over,
    vary_like,
    whole,
)
from sparsejax.base.structs import struct
from sparsejax.blocks.context import Context, Mode
from sparsejax.blocks.expert_parallel import exchanged_experts, expert_parallel, gathered_experts
from sparsejax.blocks.free_experts import free_output
from sparsejax.blocks.gating_dropout import as_exchanged, now_and_then, on_own_experts, own_experts, unrouted
from sparsejax.blocks.shared_experts import gated_mix, mixing, softmax_mix
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.mlp import MLP, Experts, ffn_width
from sparsejax.ops.dispatch import MOVEMENTS, slot_weights
from sparsejax.ops.dropout import slot_seeds
from sparsejax.ops.exchange import plan_exchange
from sparsejax.ops.ffn import Activation
from sparsejax.ops.grouped import grouped_experts
from sparsejax.routers.balance import with_local_balance, with_whole_balance
from sparsejax.routers.candidates import Inputs, Noise
from sparsejax.routers.exploration import mask_outputs
from sparsejax.routers.logits import Parameters
from sparsejax.routers.lots import Lots, draw_lots
from sparsejax.routers.replay import record
from sparsejax.routers.router import Decision, count_experts, report, route

if TYPE_CHECKING:  # the config builds its layer, so it imports this file
    from sparsejax.blocks.moe import MoESpec


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
    logits: Optional[Float[Array, "B T E"]]  # of the router below


class MoELayer(nnx.Module):
    """Router, experts and shared experts. Tokens are exchanged over the mesh axis `expert` inside one `shard_map`."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, spec: "MoESpec"):
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
        width = 2 if spec.mixes else 1 if spec.gates_shared else 0
        self.shared_mixing = mixing(mixing_key, backbone.d_model, width) if width else None
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
            keys=_row_keys(context) if spec.router.needs_noise or spec.expert_dropout else None,
            lots=_lots(context) if "lots" in spec.router.selection.traits.needs else None,
            parameters={name: parameter[...] for name, parameter in self.router.items()},
            constants={name: parameter[...] for name, parameter in self.constants.items()},
            state=None if self.controller is None else self.controller[...],
            experts=context.experts,
            logits=context.logits if spec.hands_on else None,
        )

        stored = {name: jax.tree.map(split_axes, getattr(routing, name)) for name in ("parameters", "constants")}

        def local(stay, x_BTD, routing, *weights):
            gathered = {
                name: {key: whole(value, specs[key], x_BTD) for key, value in getattr(routing, name).items()}
                for name, specs in stored.items()
            }
            routing = dataclasses.replace(routing, **gathered)
            return _routed(x_BTD, routing, weights, weight_specs, spec, context, experts.activation, stay)

        by_row: Any = P(BATCH_AXES)
        same: Any = P()
        names = ("mask", "tokens", "previous", "domains", "positions", "keys", "lots", "experts", "logits")
        rows: Any = dict.fromkeys(names, by_row)
        specs = Routing(**rows, **stored, state=same)
        rows_spec = P(BATCH_AXES, None, None)
        # Pallas calls and ragged exchanges carry no varying-axes types.
        platform = mesh_platform()
        untyped = spec.implementation(platform) != "slots" or spec.transport(platform) == "ragged_all_to_all"

        def compute(stay: bool = False):
            typed = not ((stay or spec.grouped(context.mode)) and untyped)
            ends = (rows_spec, specs, *weight_specs), (rows_spec, P(), by_row)
            run = on_each_device(functools.partial(local, stay), *ends, check_vma=typed)
            return run(x_BTD.astype(experts.dtype), routing, *weights)

        stays = spec.gating_dropout_by == "stay"
        instead = functools.partial(compute, stay=True) if stays else functools.partial(unrouted, compute)
        y_BTD, moe, by_token = now_and_then(compute, instead, spec.gating_dropout, context)
        if spec.router.balance.scope in ("microbatch", "global"):
            moe = with_whole_balance(moe, spec.router.balance, spec.experts_per_token)
        moe = dataclasses.replace(moe, **by_token)
        if self.shared is None:
            return y_BTD, moe
        shared_BTD = checkpoint_name(self.shared(x_BTD), "mlp")
        if self.shared_mixing is None:
            return y_BTD + shared_BTD, moe
        logits_BTC = self.shared_mixing(x_BTD)
        if spec.mixes:
            return softmax_mix(logits_BTC, y_BTD, shared_BTD), moe
        keys_B = _row_keys(context) if spec.shared_gate_dropout else None
        y_BTD, gate_sum = gated_mix(logits_BTC, y_BTD, shared_BTD, batch, keys_B, spec.shared_gate_dropout)
        return y_BTD, dataclasses.replace(moe, gate_sum=gate_sum, gated=routing.mask.sum(dtype=jnp.int32))


def _row_keys(context: Context) -> Optional[Array]:
    """A key for each row of the batch, from its number in the step's global batch."""
    if context.key is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(context.key, context.batch.rows)


def _lots(context: Context) -> Lots:
    """Drawn anew by every step of training; always the same at the same depth outside it."""
    number = context.layer if context.key is None else jax.random.bits(context.key, dtype=jnp.uint32)
    return draw_lots(context.batch, jnp.asarray(number))


def _routed(
    x_BTD,
    routing: Routing,
    weights,
    weight_specs,
    spec: "MoESpec",
    context: Context,
    activation: Activation,
    stay: bool,
):
    """What one device does for its rows: all experts' slots for its tokens, its experts for everyone's slots. If they
    `stay`, its own experts alone for its tokens."""
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
            dropless=stay or spec.grouped(mode),
            within=own_experts(weights, weight_specs, spec.num_experts, spec.free.total) if stay else None,
            free=spec.free.total,
            noise=noise,
            experts=None if routing.experts is None else routing.experts.reshape(groups, size, -1),
            lots=jax.tree.map(lambda lots_BT: lots_BT.reshape(groups, size), routing.lots),
            logits=None if routing.logits is None else routing.logits.reshape(groups, size, -1),
        )
        decision = route(x_GSD, routing.parameters, inputs, spec.router, spec.scored_experts, routing.state)
    if stay:
        kind = spec.num_experts, activation, spec.implementation(mesh_platform())
        y, rows, in_blocks = on_own_experts(x_GSD, decision, weights, weight_specs, *kind)
        moe = dataclasses.replace(report(decision, mask_GS), slots=rows)
        if spec.grouped(mode):  # in other steps
            travels = "expert" in weight_specs[0]
            exchange = as_exchanged(decision, spec.scored_experts) if travels else None
            moe = dataclasses.replace(moe, block_rows=in_blocks, exchange=exchange)
    elif spec.grouped(mode):
        y, decision, more = _dropless(x_GSD, decision, weights, weight_specs, spec, activation, mode)
        moe = dataclasses.replace(report(decision, mask_GS), **more)
    else:
        moe = report(decision, mask_GS)
        y = _through_slots(x_GSD, decision, noise, weights, weight_specs, spec, activation)
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
    if not (stay and balance.scope in ("sequence", "device")):  # whose loads are the place of their rows
        moe = with_local_balance(moe, chosen, p_GSE, routing.mask, balance, k, measured)
    decisions = record(decision, x_BTD.shape[0]) if context.record else None
    choices = jax.tree.map(lambda values_GS: values_GS.reshape(routing.mask.shape), decision.choices)
    logits = decision.logits_GSE.reshape(*routing.mask.shape, -1) if spec.hands_on else None
    by_token = {"decisions": decisions, "choices": choices, "logits": logits}
    return y.reshape(x_BTD.shape), sum_over(moe, BATCH_AXES), by_token


def _through_slots(
    x_GSD,
    decision: Decision,
    noise: Optional[Noise],
    weights,
    weight_specs,
    spec: "MoESpec",
    activation: Activation,
):
    movement, rate, seed_EGC = MOVEMENTS[spec.dispatch], spec.expert_dropout, None
    if noise is not None and rate:
        seed_EGC = slot_seeds(noise.bits(13), decision.pairs, decision.slots)
    with jax.named_scope("dispatch"):
        z_EGCD = checkpoint_name(movement.dispatch(x_GSD, decision.pairs, decision.slots), "slots")
        scale_EGC = vary_like(slot_weights(decision.pairs, decision.slots), z_EGCD)
    out_EGCD = expert_parallel(z_EGCD, weights, weight_specs, activation, scale_EGC, seed_EGC, rate)
    with jax.named_scope("combine"):
        return movement.combine(checkpoint_name(out_EGCD, "experts"), decision.pairs, decision.slots)


def _dropless(
    x_GSD, decision: Decision, weights, weight_specs, spec: "MoESpec", activation: Activation, mode: Mode
) -> tuple[Array, Decision, dict[str, Any]]:
    """(every pair through its expert, the decision without what the exchange had no room for, what to report)."""
    x_TD, pairs, slots = x_GSD.reshape(-1, x_GSD.shape[-1]), decision.pairs, decision.slots
    platform = mesh_platform()
    implementation = spec.implementation(platform)
    if "expert" not in weight_specs[0]:
        with jax.named_scope("experts"):
            y_TD, rows, in_blocks = grouped_experts(
                x_TD, weights, weight_specs, pairs, slots, activation, implementation
            )
        return y_TD, decision, {"slots": rows, "block_rows": in_blocks}
    transport = spec.transport(platform, len(x_TD))
    if transport == "all_gather":
        return _gathered(x_TD, decision, weights, weight_specs, spec, activation, implementation)
    size = pairs.token.shape[1]
    even = size if spec.router.selection.traits.fits else spec.experts_per_token * len(x_TD)
    room = size * jax.lax.axis_size("expert")  # for everyone's
    if mode != "generate" and not spec.router.selection.traits.together:
        room = min(math.ceil(spec.buffer_factor * even), room)
    with jax.named_scope("route"):
        exchange = plan_exchange(pairs, slots, spec.num_experts, room, "expert")
        lost_1P = exchange.lost_P[None]
        moved = ExchangeReport(
            dropped=count_experts(pairs.expert, lost_1P, spec.scored_experts),
            received=exchange.received,
            room=jnp.int32(room),
            demand=demand_of(exchange.wanted, even),
        )
    y_TD, rows, in_blocks = exchanged_experts(
        x_TD, pairs, exchange, weights, weight_specs, even, activation, implementation, transport
    )
    return y_TD, decision.without(lost_1P), {"slots": rows, "block_rows": in_blocks, "exchange": moved}


def _gathered(
    x_TD, decision: Decision, weights, weight_specs, spec: "MoESpec", activation: Activation, implementation
) -> tuple[Array, Decision, dict[str, Any]]:
    """`_dropless` for few tokens."""
    pairs, even = decision.pairs, spec.experts_per_token * len(x_TD)
    y_TD, rows, in_blocks, received = gathered_experts(
        x_TD, pairs, weights, weight_specs, even, activation, implementation
    )
    moved = ExchangeReport(
        dropped=vary_like(jnp.zeros(spec.scored_experts, jnp.int32), received),
        received=received,
        room=jnp.int32(pairs.token.size * jax.lax.axis_size("expert")),
        demand=demand_of(received, even),
    )
    return y_TD, decision, {"slots": rows, "block_rows": in_blocks, "exchange": moved}


def _groups(rows: int, length: int, spec: "MoESpec", mode: Mode) -> tuple[int, int]:
    """(G, S) of the tokens on one device."""
    if mode == "generate":
        return (rows, length) if length > 1 else (1, rows)
    size = length if spec.group_size is None else spec.group_size
    return rows * length // size, size
