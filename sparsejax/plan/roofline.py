"""How long a step takes at least, by what its devices can do: products, main memory, links."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsejax.base.sharding import AXES
from sparsejax.plan.chips import Chip
from sparsejax.plan.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step if nothing else took time. With perfect overlap a step takes the longest of them, without any
    their sum."""

    products: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        times = {"products": self.products, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])

    @property
    def shortest(self) -> float:
        return max(self.products, self.memory, self.links)

    @property
    def longest(self) -> float:
        return self.products + self.memory + self.links


def roofline(
    chip: Chip, flops: float, memory_bytes: float, traffic: Sequence[Traffic], mesh: tuple[int, ...], linked: int
) -> Roofline:
    """Of one device. `linked`: how many devices in a row reach each other by links; a collective that goes further runs
    at the speed of the network between hosts."""
    seconds = sum(row.bytes / speed(chip, row.axes or AXES, mesh, linked) for row in traffic)
    return Roofline(products=flops / chip.flops, memory=memory_bytes / chip.memory_bandwidth, links=seconds)


def speed(chip: Chip, axes: Sequence[str], mesh: tuple[int, ...], linked: int) -> float:
    """Bytes a second that a device sends along these axes; devices stand in the order of the mesh's axes."""
    # The devices of a group lie within this many in a row.
    spread = math.prod(mesh[min(AXES.index(axis) for axis in axes) :])
    return chip.links if spread <= linked else chip.network
