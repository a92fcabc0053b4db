"""What accelerators can do, from their makers' public pages: the denominators of a roofline."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates per second. `links`: bytes that leave it towards its neighbours in a slice or host, one direction;
    `network`: towards other slices or hosts."""

    name: str
    platform: Literal["tpu", "cuda"] = "tpu"
    flops: float  # bfloat16, dense
    memory: int  # bytes
    memory_bandwidth: float  # bytes
    links: float
    network: float
    cores: int = 1  # that JAX shows as devices of their own
    source: str

    @property
    def of_device(self) -> "Chip":
        """The share of one device."""
        share = {name: getattr(self, name) / self.cores for name in ("flops", "memory_bandwidth", "links", "network")}
        return dataclasses.replace(self, **share, memory=self.memory // self.cores, cores=1)


_TPUS = "https://docs.cloud.google.com/tpu/docs"
CHIPS = {
    chip.name: chip
    for chip in (
        # Pages on TPUs give the interconnect in both directions together, and the network in bits.
        Chip(
            name="v5e",
            flops=197e12,
            memory=16 * GIB,
            memory_bandwidth=819e9,
            links=200e9,
            network=6.4e12 / 8 / 256,  # of a pod of 256
            source=f"{_TPUS}/v5e",
        ),
        Chip(
            name="v5p",
            flops=459e12,
            memory=95 * GIB,
            memory_bandwidth=2765e9,
            links=600e9,
            network=50e9 / 8,
            source=f"{_TPUS}/tpu7x",  # compares v5p, v6e and TPU7x
        ),
        Chip(
            name="v6e",
            flops=918e12,
            memory=32 * GIB,
            memory_bandwidth=1638e9,
            links=400e9,
            network=100e9 / 8,
            source=f"{_TPUS}/tpu7x",
        ),
        Chip(
            name="tpu7x",
            flops=2307e12,
            memory=192 * GIB,
            memory_bandwidth=7380e9,
            links=600e9,
            network=100e9 / 8,
            cores=2,
            source=f"{_TPUS}/tpu7x",
        ),
        # NVLink is half of what is given for both directions; the network is that of NVIDIA's own DGX systems, one
        # adapter of 400 Gb/s for each GPU; the memory is what its compiler is told.
        Chip(
            name="h100",
            platform="cuda",
            flops=989.4e12,
            memory=84978434048,
            memory_bandwidth=3350e9,
            links=450e9,
            network=400e9 / 8,
            source="https://www.nvidia.com/en-us/data-center/h100/",
        ),
    )
}
