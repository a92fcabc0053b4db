"""The real TPU compiler, for a pod that nobody here owns: `pip install -e '.[plan]'`, no TPU needed."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Optional

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import AXES, MeshConfig


@contextlib.contextmanager
def described_mesh(topology: str, config: MeshConfig) -> Iterator[Mesh]:
    """The explicit mesh of `config` on the first devices of a TPU topology such as 'v5e:4x4', in force as if they were
    here: `jax.jit(...).lower(...).compile()` then compiles for them.

    Raises:
      RequestError: libtpu is not installed, it knows no such topology, or that has too few devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RequestError("the TPU compiler is not installed: pip install -e '.[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for a TPU machine's metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, so two compilers may live side by side
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise RequestError(f"no TPU topology {topology!r}: {str(error).splitlines()[0]}") from error
    needed = int(np.prod(config.shape))
    if needed > len(devices):
        raise RequestError(f"{topology} has {len(devices)} devices, and the mesh {config.shape} needs {needed}")
    mesh = Mesh(np.array(devices[:needed]).reshape(config.shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def device_memory(device: Any) -> Optional[int]:
    """Bytes of HBM of a TPU device, which may be a chip of two cores, by JAX's own table; None for what is not in
    it."""
    from jax.experimental.pallas import tpu

    kind = device.device_kind
    versions = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    version = versions.get(kind, kind.removeprefix("TPU ").removeprefix("TPU"))
    try:
        return tpu.get_tpu_info_for_chip(tpu.ChipVersion(version), getattr(device, "num_cores", 1)).hbm_capacity_bytes
    except (ValueError, NotImplementedError):
        return None
