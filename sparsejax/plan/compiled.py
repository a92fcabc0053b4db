"""What the compiler makes of a training step: the records of `pod`."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

from sparsejax.plan.roofline import Roofline
from sparsejax.plan.sentinel import Finding
from sparsejax.plan.traffic import Need, Traffic


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
    """Of a step, over all devices. `ideal` and `padded` as the plan counts them: attention exactly, nothing
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
