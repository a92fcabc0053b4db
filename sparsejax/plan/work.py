"""How much a config computes: parameters and FLOPs by component, slots of every expert block, and its routers."""

from dataclasses import dataclass
from typing import Any, Literal

from sparsejax.base.config import leaves
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import TRAINING, component_costs, mean_keys, total
from sparsejax.ops.grouped import common_slots
from sparsejax.train.config import ExperimentConfig

SlotMode = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class Component:
    """FLOPs are per token, over all layers, ideal: the selected experts, attention on rows of one document."""

    name: str
    parameters: int
    active: int
    forward: float
    training: float


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What static shapes give the experts of one kind of block. FLOPs are per token and layer, forward."""

    block: str
    layers: tuple[str, ...]
    mode: SlotMode
    num_experts: int
    experts_per_token: int
    capacity_factor: float  # asked for
    group_size: int  # S, tokens
    slots_per_expert: int  # C, for one group
    slots_per_token: float  # E · C / S
    ideal_flops: float  # k pairs, or that part of them which falls on experts with slots when all have the same load
    padded_flops: float  # every slot, filled or not
    movement_flops: float  # of `dispatch = einsum`, whose one-hot masks are matrix products

    @property
    def movement_training(self) -> float:
        """Dispatch and combine each once more in the backward pass: masks are constants there."""
        return 2 * self.movement_flops


@dataclass(frozen=True, kw_only=True)
class Router:
    """The axes of the router of some layers: dotted leaf of its config → value; also how slots are filled and moved."""

    block: str
    layers: tuple[str, ...]
    axes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """`flops_per_token`: ideal and padded (static slots and movement in place of the pairs), forward and training."""

    components: tuple[Component, ...]
    parameters: int
    active: int
    flops_per_token: dict[str, float]
    slots: tuple[Slots, ...]
    routers: tuple[Router, ...]


def work(config: ModelConfig, sequence_length: int) -> Work:
    """Everything about a model that the mesh and the batch do not change."""
    keys, cost = mean_keys(config, sequence_length), total(config)
    components = tuple(
        Component(
            name=name,
            parameters=part.parameters,
            active=part.active,
            forward=part.flops(keys, sequence_length),
            training=TRAINING * part.flops(keys, sequence_length),
        )
        for name, part in component_costs(config).items()
    )
    blocks = moe_blocks(config)
    slots = tuple(_slots(config, name, sequence_length, mode) for name in blocks for mode in ("train", "eval"))
    trained = [row for row in slots if row.mode == "train"]
    forward = cost.flops(keys, sequence_length)
    fixed = forward - sum(len(row.layers) * row.ideal_flops for row in trained)
    padded = sum(len(row.layers) * row.padded_flops for row in trained)
    padded += sum(config.blocks[layer.block].padding_flops(config, sequence_length) for layer in config.layers)
    movement = sum(len(row.layers) * row.movement_flops for row in trained)
    movement_training = sum(len(row.layers) * row.movement_training for row in trained)
    return Work(
        components=components,
        parameters=cost.parameters,
        active=cost.active,
        flops_per_token={
            "forward": forward,
            "training": TRAINING * forward,
            "forward_padded": fixed + padded + movement,
            "training_padded": TRAINING * (fixed + padded) + movement_training,
        },
        slots=slots,
        routers=tuple(_router(config, name) for name in blocks),
    )


def padded_flops(config: ExperimentConfig, backend: str) -> float:
    """FLOPs of a training step over all devices if the compiler adds none: every slot or row that the experts have on
    this mesh and kind of device, filled or not; attention exactly and no recompute, as in `work`."""
    found = work(config.model, config.data.sequence_length)
    rows = [row for row in found.slots if row.mode == "train"]
    as_slots = TRAINING * sum(len(row.layers) * row.padded_flops for row in rows)
    return _tokens(config) * (found.flops_per_token["training_padded"] - as_slots) + expert_flops(config, backend)


def expert_flops(config: ExperimentConfig, backend: str) -> float:
    """Those of the routed experts alone."""
    found = work(config.model, config.data.sequence_length)
    per_token = sum(
        len(row.layers) * _rows_over_pairs(config, row, backend) * row.ideal_flops
        for row in found.slots
        if row.mode == "train"
    )
    return _tokens(config) * TRAINING * per_token


def _rows_over_pairs(config: ExperimentConfig, row: Slots, backend: str) -> float:
    spec = moe_blocks(config.model)[row.block]
    if not spec.grouped("train"):
        return row.padded_flops / row.ideal_flops
    if config.mesh.rules.experts == "expert" and spec.exchanges(config.mesh.expert) and not spec.gathers():
        return spec.buffer_factor
    return 1.0 if spec.implementation(backend) != "slots" else row.padded_flops / row.ideal_flops


def _tokens(config: ExperimentConfig) -> int:
    """That go through the model in a step."""
    return config.data.batch_size * config.data.sequence_length * config.train.passes


def moe_blocks(config: ModelConfig) -> dict[str, MoESpec]:
    """The blocks with experts that a layer uses, by name, from the input of the model to its output."""
    used = {layer.block: config.blocks[layer.block] for layer in config.layers}
    return {name: spec for name, spec in used.items() if isinstance(spec, MoESpec)}


def group_size(spec: MoESpec, sequence_length: int) -> int:
    """S, tokens that are routed together in training and evaluation."""
    return sequence_length if spec.group_size is None else spec.group_size


def slots_per_expert(spec: MoESpec, sequence_length: int, mode: SlotMode) -> int:
    """C, for one group of unmasked tokens; dropless, the slots for a row's tokens if loads are nearly even."""
    size = group_size(spec, sequence_length)
    if spec.grouped(mode):
        return common_slots(size * spec.experts_per_token, spec.scored_experts)
    return int(spec.capacities(size, mode)[-1])


def _slots(config: ModelConfig, block: str, sequence_length: int, mode: SlotMode) -> Slots:
    spec = moe_blocks(config)[block]
    size, k = group_size(spec, sequence_length), spec.experts_per_token
    count = slots_per_expert(spec, sequence_length, mode)
    per_token, per_pair = spec.num_experts * count / size, spec.pair_flops(config)
    one_way = 2 * spec.num_experts * count * config.d_model  # a row of [S, E · C] times [E · C, D]
    return Slots(
        block=block,
        layers=_layers(config, block),
        mode=mode,
        num_experts=spec.num_experts,
        experts_per_token=k,
        capacity_factor=spec.factor(mode),
        group_size=size,
        slots_per_expert=count,
        slots_per_token=per_token,
        ideal_flops=spec.costs(config)["experts"].routed,
        padded_flops=per_token * per_pair,
        movement_flops=2 * one_way if spec.dispatch == "einsum" else 0,
    )


def _router(config: ModelConfig, block: str) -> Router:
    spec = moe_blocks(config)[block]
    axes = leaves(spec.router) | {"capacity_convention": spec.capacity_convention, "dispatch": spec.dispatch}
    return Router(block=block, layers=_layers(config, block), axes=axes)


def _layers(config: ModelConfig, block: str) -> tuple[str, ...]:
    return tuple(layer.name for layer in config.layers if layer.block == block)
