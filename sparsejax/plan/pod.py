"""The training step of a config, compiled for a pod that nobody here owns: does it fit, and what moves."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import jax

from sparsejax.base.errors import RunError
from sparsejax.plan.abstract import abstract_batch
from sparsejax.plan.collectives import Collective, read_collectives
from sparsejax.plan.hlo import module_of
from sparsejax.plan.topology import described_mesh, device_memory
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_devices
from sparsejax.train.state import abstract_state, make_optimizer
from sparsejax.train.step import make_train_step


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a kind along the same axes of the mesh, in one step of one device."""

    kind: str
    axes: tuple[str, ...]  # empty where the devices of a group are no whole axes
    count: int
    bytes: int  # that a device sends
    scopes: tuple[str, ...]  # the modules that send most, most first


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Bytes of one device, as the compiler tells them. `arguments` are state and batch; the new state takes the place
    of the old."""

    topology: str
    mesh: tuple[int, ...]
    seconds: float  # of compilation
    arguments: int
    temporaries: int
    others: int  # outputs beside the state, and the program
    memory: Optional[int]  # what the device has; None: not known
    traffic: tuple[Traffic, ...]
    loop_unknown: bool  # a collective stands in a loop of unknown length, and is counted once

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.others

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"total": self.total}


def compile_step(config: ExperimentConfig, topology: str) -> CompiledStep:
    """The step of `config`, on its own mesh, by the TPU compiler.

    Raises:
      RequestError: as `described_mesh`, or the config does not go with such devices.
      RunError: the compiler refuses the program, most often because it does not fit.
    """
    with described_mesh(topology, config.mesh) as mesh:
        check_devices(config, mesh)
        tx = make_optimizer(config)
        state, batch = abstract_state(config, tx, mesh), abstract_batch(config, mesh)
        begun = time.perf_counter()
        lowered = jax.jit(make_train_step(config, tx), donate_argnums=0).lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise RunError(f"the compiler for {topology}: {str(error).splitlines()[0]}") from error
        seconds = time.perf_counter() - begun
        memory: Any = compiled.memory_analysis()  # the TPU compiler tells it
        found = read_collectives(compiled.as_text() or "", config.mesh.shape)
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return CompiledStep(
            topology=topology,
            mesh=config.mesh.shape,
            seconds=seconds,
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            others=new + memory.generated_code_size_in_bytes,
            memory=device_memory(mesh.devices.flat[0]),
            traffic=tuple(sorted(_traffic(found), key=lambda each: -each.bytes)),
            loop_unknown=any(each.loop_unknown for each in found),
        )


def _traffic(found: Sequence[Collective]) -> list[Traffic]:
    rows = []
    for kind, axes in dict.fromkeys((each.kind, each.axes) for each in found):
        same = [each for each in found if (each.kind, each.axes) == (kind, axes)]
        scopes: dict[str, int] = {}
        for each in same:
            scopes[module_of(each.scope)] = scopes.get(module_of(each.scope), 0) + each.bytes
        rows.append(
            Traffic(
                kind=kind,
                axes=axes or (),
                count=sum(each.times for each in same),
                bytes=sum(each.bytes for each in same),
                scopes=tuple(sorted(scopes, key=lambda name: -scopes[name])[:3]),
            )
        )
    return rows
