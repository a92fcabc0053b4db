"""What devices send each other in a step, and the least that layers laid out like this have to send."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import jax.numpy as jnp

from sparsejax.blocks.moe import MoESpec
from sparsejax.model.tables import layers_of
from sparsejax.ops.rows import kept_rows
from sparsejax.plan.collectives import Collective
from sparsejax.plan.hlo import module_of
from sparsejax.plan.layout import Layout, Tensor
from sparsejax.train.config import ExperimentConfig

SCOPES = 3
"""Modules that are named with a kind of traffic."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a kind along the same axes of the mesh for one purpose, in one step of one device."""

    purpose: str
    kind: str
    axes: tuple[str, ...]  # empty where the devices of a group are no whole axes
    count: int
    bytes: int  # that a device sends
    scopes: tuple[str, ...]  # the modules that send most, most first


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a device sends in a step for one purpose, and the least for which that can be had."""

    purpose: str
    sent: int
    least: int


def by_kind(found: Sequence[Collective]) -> tuple[Traffic, ...]:
    """Most bytes first."""
    rows = []
    groups: dict[tuple[str, str, Optional[tuple[str, ...]]], list[Collective]] = {}
    for each in found:
        groups.setdefault((purpose_of(each), each.kind, each.axes), []).append(each)
    for (purpose, kind, axes), same in groups.items():
        scopes: dict[str, int] = {}
        for each in same:
            scopes[module_of(each.scope)] = scopes.get(module_of(each.scope), 0) + each.bytes
        rows.append(
            Traffic(
                purpose=purpose,
                kind=kind,
                axes=axes or (),
                count=sum(each.times for each in same),
                bytes=sum(each.bytes for each in same),
                scopes=tuple(sorted(scopes, key=lambda name: -scopes[name])[:SCOPES]),
            )
        )
    return tuple(sorted(rows, key=lambda each: -each.bytes))


EXCHANGE = "exchange of tokens"
GATHERS = "gathers of split parameters"
GRADIENTS = "sums of gradients"
TENSOR = "tensor parallelism"
TABLES = "rows of lookup tables"
_OF_TABLES = re.compile(r"memory/\w+/(pre)?fetch|/tables/")
OTHER = "other"


def purpose_of(row: Collective) -> str:
    """By its kind and axes: nothing else of a model goes along them. An exchange by gathers, and rows of tables, tell
    by their scope."""
    if _OF_TABLES.search(row.scope):
        return TABLES
    to_all = row.kind in ("all-to-all", "ragged-all-to-all")
    of_all = row.kind in ("all-gather", "reduce-scatter") and "/exchange/" in row.scope
    if row.axes == ("expert",) and (to_all or of_all):
        return EXCHANGE
    if row.axes == ("tensor",):
        return TENSOR
    if row.kind == "all-gather" and row.axes == ("data",):
        return GATHERS
    if row.kind in ("all-reduce", "reduce-scatter") and row.axes and "tensor" not in row.axes:
        return GRADIENTS
    return OTHER


def needs(config: ExperimentConfig, layout: Layout, traffic: Sequence[Traffic]) -> tuple[Need, ...]:
    """What was sent beside the least, by purpose; `least` of what no layer needs is 0."""
    least = least_bytes(config, layout.tensors)
    sent = dict.fromkeys((*least, OTHER), 0)
    for row in traffic:
        sent[row.purpose] += row.bytes
    rows = (Need(purpose=name, sent=size, least=least.get(name, 0)) for name, size in sent.items())
    return tuple(row for row in rows if row.sent or row.least)


def least_bytes(config: ExperimentConfig, tensors: Sequence[Tensor]) -> dict[str, int]:
    """Purpose → bytes that a device has to send in a step, of numbers in the type of computation.

    * exchange: k pairs of every token there and back, forward and backward, (n − 1)/n of which leave the device; with
      exchange=all_gather every token to all n devices, and nothing with replicated experts;
    * gathers: every parameter that is split over `data`, once a microbatch, twice where `model.remat` computes again;
    * gradients: a reduce-scatter of those, once a microbatch, and a sum of what a device holds over the axes of the
      batch that do not split it;
    * rows of lookup tables, as if no two tokens read the same, in one round: of tables that are split each row there
      and its gradient back, which is summed before, and so float32, where tables are split by rows; of tables that are
      not split the gradient alone (`train.table_step`);
    * tensor parallelism: two sums of a layer's output forward and two backward, one more where remat computes again,
      and one for the embedding each way."""
    mesh, model = config.mesh, config.model
    number, d_model = jnp.dtype(model.dtype).itemsize, model.d_model
    passes = config.train.accumulation * config.train.passes
    tokens = config.microbatch_size // mesh.batch_shards * config.data.sequence_length
    remat = model.remat != "none"
    blocks = [model.blocks[layer.block] for layer in model.layers]
    split = mesh.expert if mesh.rules.experts == "expert" else 1
    moe = [spec for spec in blocks if isinstance(spec, MoESpec) and spec.exchanges(split)]
    exchanged = sum(_copies(spec, tokens, split) for spec in moe)
    exchange = passes * 4 * tokens * exchanged * d_model * number * _leaving(split)
    gathers = gradients = 0.0
    for tensor in tensors:
        if tensor.kind != "parameters" or tensor.name.startswith("params.tables"):
            continue
        splits = _splits(tensor, mesh.shape)
        held = math.prod(tensor.shape) // math.prod(splits.values()) * number
        over_data = passes * held * splits["data"] * _leaving(splits["data"])
        gathers += over_data * (2 if remat and tensor.name.startswith("params.stack") else 1)
        whole = (mesh.data if splits["data"] == 1 else 1) * (mesh.expert if splits["expert"] == 1 else 1)
        gradients += over_data + 2 * held * _leaving(whole)
    sums = 4 * len(blocks) + (len(blocks) if remat else 0) + 2
    tensor_parallel = passes * sums * 2 * tokens * d_model * number * _leaving(mesh.tensor)
    rows = sum(_rows_of_tables(config, name, passes * tokens) for name in model.memory)
    least = {EXCHANGE: exchange, GATHERS: gathers, GRADIENTS: gradients, TENSOR: tensor_parallel, TABLES: rows}
    return {name: round(size) for name, size in least.items()}


def _rows_of_tables(config: ExperimentConfig, name: str, tokens: int) -> float:
    """Bytes of one memory's rows, the step reading them for so many tokens of a device."""
    model, devices = config.model, config.mesh.batch_shards
    spec, layers = model.memory[name], len(layers_of(model, name))
    width, fetches = spec.row_width(model), 1 if spec.shared and spec.address.known_at == "input" else layers
    back = layers * tokens * spec.address.lookups
    if spec.storage == "replicated":
        stored = kept_rows(spec.rows(model.vocab_size)) * (1 if spec.shared else layers)
        return 4 * width * min((devices - 1) * back, 2 * stored * _leaving(devices))
    there, number = fetches * tokens * spec.address.lookups, jnp.dtype(model.dtype).itemsize
    return width * (number * there + (number if spec.storage == "features" else 4) * back) * _leaving(devices)


def _copies(spec: MoESpec, tokens: int, devices: int) -> float:
    """How often a token travels one way."""
    if spec.grouped("train") and spec.gathers(tokens):
        return devices
    return spec.experts_per_token * spec.num_experts / spec.scored_experts


def _leaving(devices: int) -> float:
    """The part of an array that is for other devices."""
    return (devices - 1) / devices


def _splits(tensor: Tensor, mesh: tuple[int, int, int]) -> dict[str, int]:
    """Into how many parts each axis of the mesh splits it."""
    used = {name for part in tensor.spec for name in (part if isinstance(part, tuple) else (part,))}
    return {axis: size if axis in used else 1 for axis, size in zip(("data", "expert", "tensor"), mesh, strict=True)}
