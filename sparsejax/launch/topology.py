"""What clouds hand out as one piece: a slice of TPU chips, or hosts of GPUs, by name as in `v5e:4x4` and `h100:2x8`.

Names and sizes are those of Google Cloud's documentation ("Plan TPUs in GKE", "TPU configurations" of each generation,
"About GPUs in GKE"); a slice of eight v5e or v6e chips is the host that has all eight.
"""

import math
from dataclasses import dataclass
from typing import Optional

from sparsejax.base.errors import RequestError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """A generation. `accelerator_type` and `runtime` are what Cloud TPU calls it; None: to be had through GKE alone."""

    gke: str  # the value of the node label cloud.google.com/gke-tpu-accelerator
    dimensions: int
    most: int  # chips of the largest slice
    devices: int = 1  # that JAX shows of a chip
    accelerator_type: Optional[str] = None
    cores: int = 1  # by which the accelerator type counts: v5p-8 are four chips
    runtime: Optional[str] = None


TPUS = {
    "v4": Tpu(
        gke="tpu-v4-podslice", dimensions=3, most=4096, accelerator_type="v4", cores=2, runtime="tpu-ubuntu2204-base"
    ),
    "v5e": Tpu(
        gke="tpu-v5-lite-podslice",
        dimensions=2,
        most=256,
        accelerator_type="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v5p": Tpu(gke="tpu-v5p-slice", dimensions=3, most=6144, accelerator_type="v5p", cores=2, runtime="v2-alpha-tpuv5"),
    "v6e": Tpu(gke="tpu-v6e-slice", dimensions=2, most=256, accelerator_type="v6e", runtime="v2-alpha-tpuv6e"),
    "tpu7x": Tpu(gke="tpu7x", dimensions=3, most=9216, devices=2),
}

GPUS = {
    "a100": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
"""By the value of the node label cloud.google.com/gke-accelerator."""

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of three dimensions; larger ones are made of cubes of 4x4x4


@dataclass(frozen=True, kw_only=True)
class Slice:
    """`hosts` hosts of `chips` TPU chips or GPUs each. `name` is the generation, `shape` its topology (TPU)."""

    name: str
    shape: str
    hosts: int
    chips: int
    tpu: Optional[Tpu]

    @property
    def devices(self) -> int:
        """That JAX shows on one host."""
        return self.chips * (1 if self.tpu is None else self.tpu.devices)


def parse_slice(text: str, gpus: bool) -> Slice:
    """The slice of a name.

    Args:
      gpus: hosts of GPUs will do, too.

    Raises:
      RequestError: there is no such slice; the line says which there are.
    """
    name, _, shape = text.partition(":")
    known = [*TPUS, *(GPUS if gpus else ())]
    if name not in known:
        raise RequestError(
            f"--topology={text}: unknown chip {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"
        )
    if name in GPUS:
        hosts, _, chips = shape.partition("x")
        if not (hosts.isdecimal() and int(hosts) > 0 and chips in ("1", "2", "4", "8")):
            raise RequestError(f"--topology={text}: not {name}:HOSTSxGPUS, with 1, 2, 4 or 8 GPUs in a host")
        return Slice(name=name, shape=shape, hosts=int(hosts), chips=int(chips), tpu=None)
    tpu = TPUS[name]
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    total = math.prod(sizes)
    if tpu.dimensions == 2:
        fits, allowed = shape in FLAT, ", ".join(FLAT)
    else:
        cubes = len(sizes) == 3 and sizes == sorted(sizes) and not any(size % 4 for size in sizes)
        fits = shape in SMALL or (cubes and 0 < total <= tpu.most)
        allowed = f"{', '.join(SMALL)}, and AxBxC with A ≤ B ≤ C multiples of 4, up to {tpu.most} chips"
    if not fits:
        raise RequestError(f"--topology={text}: no such slice; those of {name}: {allowed}")
    chips = total if tpu.dimensions == 2 and total <= 8 else 4
    return Slice(name=name, shape=shape, hosts=total // chips, chips=chips, tpu=tpu)
