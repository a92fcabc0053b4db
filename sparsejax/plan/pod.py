"""The training step of a config, compiled for a pod that nobody here owns: does it fit, what it costs, what moves."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import jax

from sparsejax.base.errors import RunError
from sparsejax.plan.abstract import abstract_batch
from sparsejax.plan.collectives import read_collectives
from sparsejax.plan.hlo import module_of
from sparsejax.plan.layout import Layout
from sparsejax.plan.live import Buffer, live_at_peak
from sparsejax.plan.memory_traffic import memory_bytes
from sparsejax.plan.products import Dot, read_dots
from sparsejax.plan.roofline import Roofline, roofline
from sparsejax.plan.sentinel import (
    Finding,
    activation_axes,
    dense_fallback,
    gathered_experts,
    idle_mesh_axes,
    idle_rules,
    replicated,
)
from sparsejax.plan.topology import Topology, described_mesh, parse_topology
from sparsejax.plan.traffic import Need, Traffic, by_kind, needs
from sparsejax.plan.work import expert_flops, padded_flops, work
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_devices
from sparsejax.train.state import abstract_state, make_optimizer
from sparsejax.train.step import make_train_step

LARGEST = 10
DISPATCH = ("/route/", "/dispatch/", "/exchange/", "/experts/", "/combine/", "/merge/")
"""Scopes of what a mixture of experts moves and computes for its slots."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Something large on a device: a tensor of the state by its path, or what a step writes by the module it is for."""

    name: str
    kind: str  # a class of `CompiledStep.bytes_per_device`
    type: str
    count: int
    bytes: int  # of all of them


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a step, over all devices. `ideal` and `padded` as the plan counts them: causal attention exactly, nothing
    computed again. `attention` is what the program computes in place of `ideal_attention`."""

    ideal: float
    padded: float
    compiled: float
    ideal_attention: float
    attention: float

    @property
    def ratios(self) -> dict[str, float]:
        executed = self.ideal - self.ideal_attention + self.attention
        return {
            "compiled_over_ideal": self.compiled / self.ideal,
            "compiled_over_padded": self.compiled / self.padded,
            "compiled_over_ideal_attention_as_executed": self.compiled / executed,
        }


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """`bytes_per_device`: parameters, optimizer_state, balancing_state, counters, batch, padding (of those to tiles),
    dispatch_buffers, other_temporaries, others (outputs beside the state, and the program); their sum is what the
    compiler asks for. The new state takes the place of the old."""

    topology: str
    mesh: tuple[int, ...]
    seconds: float  # of compilation
    bytes_per_device: dict[str, int]
    peak: int  # the compiler's own figure
    memory: int  # what a device has
    largest: tuple[Holding, ...]
    flops: Flops
    time: Roofline
    traffic: tuple[Traffic, ...]
    needs: tuple[Need, ...]
    findings: tuple[Finding, ...]
    loop_unknown: bool  # something stands in a loop of unknown length, and is counted once

    @property
    def total(self) -> int:
        return sum(self.bytes_per_device.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    @property
    def flops_utilisation(self) -> float:
        """Ideal FLOPs of the shortest step over what the devices could do in it."""
        return self.time.products * self.flops.ideal / self.flops.compiled / self.time.shortest

    def to_dict(self) -> dict[str, Any]:
        time_ = dataclasses.asdict(self.time)
        told = {"bound": self.time.bound, "shortest": self.time.shortest, "longest": self.time.longest}
        return dataclasses.asdict(self) | {
            "total": self.total,
            "fits": self.fits,
            "flops": dataclasses.asdict(self.flops) | self.flops.ratios,
            "time": time_ | told | {"flops_utilisation": self.flops_utilisation},
        }


@dataclass(frozen=True, kw_only=True)
class DoesNotFit:
    """A step that the compiler found too large. Bytes of one device; None where its message does not tell."""

    topology: str
    mesh: tuple[int, ...]
    seconds: float
    needed: Optional[int]
    memory: Optional[int]
    message: str  # its first line

    fits = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fits": False}


def compile_step(config: ExperimentConfig, topology: str, layout: Layout) -> CompiledStep | DoesNotFit:
    """The step of `config`, on its own mesh, which `layout` is of, by the real compiler.

    Raises:
      RequestError: as `described_mesh`, or the config does not go with such devices.
      RunError: the compiler refuses the program, for another reason than its size.
    """
    asked = parse_topology(topology)
    with described_mesh(topology, config.mesh) as mesh:
        check_devices(config, mesh)
        tx = make_optimizer(config)
        state, batch = abstract_state(config, tx, mesh), abstract_batch(config, mesh)
        begun = time.perf_counter()
        traced = jax.jit(make_train_step(config, tx), donate_argnums=0).trace(state, batch)
        lowered = traced.lower(lowering_platforms=(asked.chip.platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            told = out_of_memory(str(error))
            if told is None:
                raise RunError(f"the compiler for {topology}: {str(error).splitlines()[0]}") from error
            seconds, message = time.perf_counter() - begun, str(error).splitlines()[0]
            sizes = {"needed": told[0], "memory": told[1]}
            return DoesNotFit(topology=topology, mesh=config.mesh.shape, seconds=seconds, message=message, **sizes)
        seconds = time.perf_counter() - begun
        return read_step(config, asked, layout, compiled.as_text() or "", compiled.memory_analysis(), seconds)


def read_step(
    config: ExperimentConfig, topology: Topology, layout: Layout, text: str, memory: Any, seconds: float
) -> CompiledStep:
    """What the text of a compiled step says, and `memory`, what its compiler tells of its sizes."""
    chip = topology.device
    dots, found, held = read_dots(text), read_collectives(text, layout.mesh), live_at_peak(text)
    traffic = by_kind(found)
    saved = layout.estimates["saved_for_backward"]
    findings = (
        *dense_fallback(dots, expert_flops(config, topology.backend) / layout.devices, held),
        *replicated(layout, chip.memory),
        *gathered_experts(found),
        *idle_rules(config, layout),
        *idle_mesh_axes(layout.mesh, activation_axes(config), saved),
    )
    products = sum(dot.flops for dot in dots)
    return CompiledStep(
        topology=topology.name,
        mesh=layout.mesh,
        seconds=seconds,
        bytes_per_device=_bytes(layout, memory, held),
        peak=memory.peak_memory_in_bytes,
        memory=chip.memory,
        largest=_largest(layout, held),
        flops=_flops(config, topology.backend, dots, layout.devices),
        time=roofline(chip, products, memory_bytes(text), traffic, layout.mesh, topology.linked),
        traffic=traffic,
        needs=needs(config, layout, traffic),
        findings=findings,
        loop_unknown=any(each.loop_unknown for each in (*found, *dots)),
    )


def _bytes(layout: Layout, memory: Any, held: Sequence[Buffer]) -> dict[str, int]:
    classes = ("parameters", "optimizer_state", "balancing_state", "counters", "batch")
    sizes = {name: layout.bytes_per_device[name] for name in classes}
    padding = memory.argument_size_in_bytes - sum(sizes.values())
    sizes["batch"] += min(0, padding)  # fields that the step does not read are left out
    dispatch = sum(each.bytes for each in held if any(scope in each.scope for scope in DISPATCH))
    dispatch = min(dispatch, memory.temp_size_in_bytes)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return sizes | {
        "padding": max(0, padding),
        "dispatch_buffers": dispatch,
        "other_temporaries": memory.temp_size_in_bytes - dispatch,
        "others": new + memory.generated_code_size_in_bytes,
    }


def _largest(layout: Layout, held: Sequence[Buffer]) -> tuple[Holding, ...]:
    state = [
        Holding(
            name=each.name,
            kind=each.kind,
            type=f"{each.dtype}[{','.join(map(str, each.shape))}]",
            count=1,
            bytes=each.bytes_per_device,
        )
        for each in layout.tensors
    ]
    alike = Counter((module_of(each.scope), each.kind, each.bytes) for each in held)
    written = [
        Holding(name=name, kind="temporaries", type=kind, count=count, bytes=count * size)
        for (name, kind, size), count in alike.items()
    ]
    return tuple(sorted([*state, *written], key=lambda each: -each.bytes)[:LARGEST])


def _flops(config: ExperimentConfig, backend: str, dots: Sequence[Dot], devices: int) -> Flops:
    length = config.data.sequence_length
    tokens = config.data.batch_size * length * config.train.passes
    per_token = work(config.model, length)
    scores = sum(part.training for part in per_token.components if part.name == "attention_scores")
    # Attention alone is computed inside `shard_map` below this name.
    attention = sum(dot.flops for dot in dots if "/attention/shard_map/" in dot.scope)
    return Flops(
        ideal=tokens * per_token.flops_per_token["training"],
        padded=padded_flops(config, backend),
        compiled=devices * sum(dot.flops for dot in dots),
        ideal_attention=tokens * scores,
        attention=devices * attention,
    )


_MEMORY = (
    re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm"),
    re.compile(r"required[^()]*\(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM \(([\d.]+)([KMGT]?)i?B?\)"),
)


def out_of_memory(message: str) -> Optional[tuple[Optional[int], Optional[int]]]:
    """(needed, there is), in bytes, of a compiler's complaint about memory; None for another complaint."""
    found = next((match for pattern in _MEMORY if (match := pattern.search(message))), None)
    if found is None:
        return (None, None) if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message else None
    scale = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    needed, there_is = (round(float(found[n]) * 1024 ** scale[found[n + 1]]) for n in (1, 3))
    return needed, there_is
