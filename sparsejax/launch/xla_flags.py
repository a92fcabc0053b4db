"""The compiler flags that launched jobs run with, each with what it is for. This is their one place.

XLA for GPU reads `XLA_FLAGS`, libtpu reads `LIBTPU_INIT_ARGS`; both refuse flags that they do not know, and tests ask
them. None changes what is computed. `launch --env=XLA_FLAGS=...` (or `LIBTPU_INIT_ARGS`) replaces them all.

Sources: "GPU performance tips" of JAX (docs.jax.dev), NVIDIA's JAX-Toolbox (docs.nvidia.com/jax-toolbox), and the flag
library of MaxText (benchmarks/xla_flags_library.py).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Flag:
    name: str
    value: str
    why: str

    @property
    def text(self) -> str:
        return f"--{self.name}={self.value}"


def _on(name: str, why: str) -> Flag:
    return Flag(name=name, value="true", why=why)


GPU = (
    _on("xla_gpu_enable_latency_hiding_scheduler", "starts collectives early and computes while they are under way"),
    _on("xla_gpu_enable_pipelined_all_gather", "FSDP: the next layer's parameters come while this one computes"),
    _on("xla_gpu_enable_pipelined_reduce_scatter", "FSDP: a layer's gradients leave while the next one computes"),
    _on("xla_gpu_enable_pipelined_all_reduce", "the same for gradients of what is replicated"),
    Flag(
        name="xla_gpu_enable_while_loop_double_buffering",
        value="true",
        why="unrolls the scan over layers by two, without which nothing overlaps from one layer to the next",
    ),
)

TPU = (
    _on("xla_tpu_enable_latency_hiding_scheduler", "starts collectives early and computes while they are under way"),
    _on("xla_tpu_enable_async_collective_fusion", "a collective runs inside the fusion that computes meanwhile"),
    _on("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "the same for FSDP's all-gathers"),
    _on("xla_tpu_enable_async_collective_fusion_multiple_steps", "one collective may span several fusions"),
    _on("xla_tpu_overlap_compute_collective_tc", "lets the core compute while it drives the links"),
    _on("xla_enable_async_all_gather", "all-gathers have a start and an end, with other work between"),
    _on("xla_tpu_enable_async_all_to_all", "the exchange of experts: computes what does not wait for it"),
)

TPU_SLICES = (
    _on("xla_tpu_enable_data_parallel_all_reduce_opt", "several slices: gradients between them overlap"),
    _on("xla_tpu_data_parallel_opt_different_sized_ops", "… also where they differ in size, as those of experts do"),
)


def environment(platform: Literal["gpu", "tpu"], several: bool) -> dict[str, str]:
    """The variables to set. `several`: processes of GPUs, or slices of TPUs; what only they need is left out else."""
    if platform == "gpu":
        return {"XLA_FLAGS": " ".join(flag.text for flag in GPU)} if several else {}
    return {"LIBTPU_INIT_ARGS": " ".join(flag.text for flag in TPU + (TPU_SLICES if several else ()))}
