"""Which mesh for so many devices: all that the config allows, ranked by a model of memory and time; the best compiled.

The model knows what a step cannot do without: its state and what it keeps for the backward pass, its products, the
least that it reads, writes and sends. A compiler adds to that."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import jax

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.plan.abstract import abstract_batch, abstract_mesh, device_bytes
from sparsejax.plan.activations import saved_for_backward
from sparsejax.plan.compiled import CompiledStep, DoesNotFit
from sparsejax.plan.estimate import on_mesh
from sparsejax.plan.format import bytes_
from sparsejax.plan.layout import Tensor, layout, tensors_of
from sparsejax.plan.pod import compile_step
from sparsejax.plan.roofline import Roofline, roofline
from sparsejax.plan.topology import Topology, parse_topology
from sparsejax.plan.traffic import EXCHANGE, GATHERS, GRADIENTS, TABLES, TENSOR, Traffic, least_bytes
from sparsejax.plan.work import TRAINING, padded_flops
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import abstract_state, make_optimizer

Mesh = tuple[int, int, int]
ALONG = {
    EXCHANGE: ("expert",),
    GATHERS: ("data",),
    GRADIENTS: ("data", "expert"),
    TENSOR: ("tensor",),
    TABLES: ("data", "expert"),
}
"""The axes along which devices send for a purpose."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One mesh. `refused` says why the config does not go with it; else there is a prediction."""

    mesh: Mesh
    refused: Optional[str] = None
    bytes_per_device: int = 0
    memory: int = 0
    time: Optional[Roofline] = None
    compiled: Optional[CompiledStep | DoesNotFit] = None

    @property
    def fits(self) -> bool:
        """As predicted, and as compiled where it is."""
        compiled = self.compiled is None or self.compiled.fits
        return self.refused is None and self.too_much == 0 and compiled

    @property
    def too_much(self) -> int:
        """Predicted bytes that a device has no room for."""
        return max(0, self.bytes_per_device - self.memory)

    @property
    def compiled_time(self) -> Optional[Roofline]:
        return self.compiled.time if isinstance(self.compiled, CompiledStep) else None

    @property
    def rank(self) -> tuple[bool, bool, int, bool, float, float, Mesh]:
        """Less is better: those that fit, compiled before predicted, by their time if all is done at once, then one
        after the other."""
        time = self.compiled_time or self.time
        times = (time.shortest, time.longest) if time else (0.0, 0.0)
        return self.refused is not None, not self.fits, self.too_much, self.compiled_time is None, *times, self.mesh

    def to_dict(self) -> dict[str, Any]:
        record = {"mesh": self.mesh, "refused": self.refused, "fits": self.fits}
        if self.time is None:
            return record
        time = dataclasses.asdict(self.time) | {"bound": self.time.bound, "shortest": self.time.shortest}
        compiled = None if self.compiled is None else self.compiled.to_dict()
        return record | {"bytes_per_device": self.bytes_per_device, "time": time, "compiled": compiled}


def search(config: ExperimentConfig, topology: str, compile_best: int) -> list[Candidate]:
    """Every mesh of all devices of the topology, best first; of the first by prediction, what the compiler says.

    Raises:
      RequestError: no mesh goes with this config, or the topology is none.
    """
    asked = parse_topology(topology)
    found = [_candidate(config, mesh, asked) for mesh in meshes(asked.num_devices)]
    if all(each.refused for each in found):
        raise RequestError(f"no mesh of {asked.num_devices} devices goes with this config: {found[0].refused}")
    ranked = sorted(found, key=lambda each: each.rank)
    best = [each for each in ranked if each.fits][:compile_best]
    told = [_compiled(config, topology, each) if each in best else each for each in ranked]
    return sorted(told, key=lambda each: each.rank)


def meshes(devices: int) -> Iterator[Mesh]:
    """(data, expert, tensor) with that product."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in sizes:
        for expert in sizes:
            if devices % (tensor * expert) == 0:
                yield devices // (tensor * expert), expert, tensor


def _candidate(config: ExperimentConfig, mesh: Mesh, topology: Topology) -> Candidate:
    try:
        placed = on_mesh(config, mesh)
    except ConfigError as error:
        return Candidate(mesh=mesh, refused=str(error))
    if mesh[1] > 1 and not any(config.model.blocks[name].has_router for name in config.model.positions.values()):
        return Candidate(mesh=mesh, refused=f"mesh.expert={mesh[1]}: the model has no experts to split")
    tensors, batch, kept = _traced(placed)
    state = sum(tensor.bytes_per_device for tensor in tensors)
    parameters = sum(tensor.bytes_per_device for tensor in tensors if tensor.kind == "parameters")
    return Candidate(
        mesh=mesh,
        # Gradients, as large as parameters, take the room of what is kept as it is used up.
        bytes_per_device=state + batch + max(parameters, kept),
        memory=topology.device.memory,
        time=_time(placed, topology, tensors, kept),
    )


def _traced(config: ExperimentConfig) -> tuple[list[Tensor], int, int]:
    """(the tensors of the state; bytes of a device for the batch, and for what the backward pass is left)."""
    mesh = abstract_mesh(config.mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state, batch = abstract_state(config, make_optimizer(config), mesh), abstract_batch(config, mesh)
        kept = sum(size for _, size in saved_for_backward(config, state, batch))
        return list(tensors_of(state)), sum(map(device_bytes, batch.values())), kept


def _time(config: ExperimentConfig, topology: Topology, tensors: Sequence[Tensor], kept: int) -> Roofline:
    mesh, least = config.mesh.shape, least_bytes(config, tensors)
    again = 1 + 1 / TRAINING if config.model.remat == "full" else 1.0
    products = again * padded_flops(config, topology.backend) / topology.num_devices
    # The optimizer reads and writes the state and reads gradients, which the backward pass has written; weights are
    # written when gathered, and read by a forward and twice by a backward pass of every microbatch.
    state = sum(tensor.bytes_per_device for tensor in tensors)
    parameters = sum(tensor.bytes_per_device for tensor in tensors if tensor.kind == "parameters")
    gathered = parameters / 2 * config.mesh.data
    passes = config.train.accumulation * config.train.passes
    memory = 2 * state + 2 * parameters + passes * (4 * gathered + 2 * kept)
    sent = [
        Traffic(purpose=purpose, kind=purpose, axes=ALONG[purpose], count=1, bytes=size, scopes=())
        for purpose, size in least.items()
    ]
    return roofline(topology.device, products, memory, sent, mesh, topology.linked)


def _compiled(config: ExperimentConfig, topology: str, candidate: Candidate) -> Candidate:
    placed = on_mesh(config, candidate.mesh)
    return dataclasses.replace(candidate, compiled=compile_step(placed, topology, layout(placed)))


def why(candidate: Candidate, best: Candidate) -> str:
    """What speaks against a mesh, in a few words; '' for the best."""
    if candidate.refused is not None:
        return candidate.refused
    if candidate.compiled is not None and not candidate.compiled.fits:
        return verdict(candidate.compiled)
    if candidate.too_much:
        return f"does not fit: {candidate.too_much / 2**30:.3g} GiB too much"
    assert candidate.time is not None and best.time is not None
    if candidate.mesh == best.mesh:
        return ""
    time, least = candidate.time, best.time
    if candidate.compiled_time is not None and best.compiled_time is not None:
        time, least = candidate.compiled_time, best.compiled_time
    slower = time.shortest / least.shortest
    if slower > 1.005:
        return f"{slower:.2f} × the best: bound by {time.bound}"
    parts = {name: getattr(time, name) - getattr(least, name) for name in ("products", "memory", "links")}
    return f"as fast if all overlaps, else more {max(parts, key=lambda name: parts[name])}"


def verdict(step: CompiledStep | DoesNotFit) -> str:
    """Whether it fits, in a few words."""
    if isinstance(step, CompiledStep):
        left = step.memory - step.total
        return f"fits, {bytes_(left)} left" if step.fits else f"does not fit: {bytes_(-left)} too much"
    if step.needed is None or step.memory is None:
        return f"does not fit: {step.message}"
    return f"does not fit: needs {bytes_(step.needed)} of {bytes_(step.memory)}"
