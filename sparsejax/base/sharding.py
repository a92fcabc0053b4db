"""Mesh, logical-axis rules, and the few helpers that say where an array lives.

The mesh always has the three axes `('data', 'expert', 'tensor')`, all explicit, and axes of length 1 stay: one device
is the mesh 1×1×1. Rows of a batch are split over `data` and `expert` together. A parameter names its logical axes;
one table, `Rules`, maps them to mesh axes. FSDP is the rule `embed → data`: stored split, gathered by `whole` where it
is used."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sparsejax.base.errors import ConfigError

AXES = ("data", "expert", "tensor")
BATCH_AXES = ("data", "expert")
"""Mesh axes over which the rows of a batch are split."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis → mesh axis, or None for replicated along it. A parameter may not use one mesh axis twice."""

    embed: Optional[Literal["data"]] = "data"  # model width of a parameter: 'data' is FSDP
    mlp: Optional[Literal["tensor"]] = "tensor"  # hidden width of feed-forward networks and experts
    heads: Optional[Literal["tensor"]] = "tensor"  # query heads
    kv_heads: Optional[Literal["tensor"]] = "tensor"  # key and value heads
    vocab: Optional[Literal["tensor"]] = "tensor"  # rows of the embedding, columns of the head
    experts: Optional[Literal["expert"]] = "expert"  # expert parallelism; None keeps every expert everywhere

    def spec(self, axes: Sequence[Optional[str]], ndim: int) -> P:
        """The `PartitionSpec` of a parameter with these logical axes; leading axes added by stacking are replicated.

        Raises:
          ValueError: a name is unknown, or two axes land on one mesh axis.
        """
        mesh_axes = [None if name is None else self._mesh_axis(name) for name in axes]
        split = [found for found in mesh_axes if found is not None]
        used = [axis for found in split for axis in (found if isinstance(found, tuple) else [found])]
        if len(set(used)) < len(used):
            raise ValueError(f"logical axes {tuple(axes)} map to {tuple(mesh_axes)}: a mesh axis is used twice")
        return P(*[None] * (ndim - len(axes)), *mesh_axes)

    def _mesh_axis(self, name: str) -> Optional[str | tuple[str, ...]]:
        if name in OF_TABLES:
            return BATCH_AXES
        if name not in RULE_NAMES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULE_NAMES)}")
        return getattr(self, name)


OF_TABLES = ("rows", "features")
"""Logical axes of lookup tables. They are split over all devices that split a batch: who asks also keeps."""

RULE_NAMES = tuple(f.name for f in dataclasses.fields(Rules))


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. `data = -1` takes what the other two leave."""

    data: int = 1
    expert: int = 1
    tensor: int = 1
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise ConfigError(
                    name, f"{size} is not a number of devices; allowed: 1, 2, …" + (" or -1" if name == "data" else "")
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.data, self.expert, self.tensor)

    @property
    def batch_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.data * self.expert

    def resolve(self, num_devices: int) -> "MeshConfig":
        """This mesh with `data = -1` filled in.

        Raises:
          ConfigError: the mesh wants more devices than there are, or -1 cannot be filled.
        """
        fixed = self.expert * self.tensor
        data = num_devices // fixed if self.data == -1 else self.data
        if data < 1 or data * fixed > num_devices:
            wanted = f"{self.data}×{self.expert}×{self.tensor}"
            raise ConfigError("mesh", f"{wanted} needs {max(data, 1) * fixed} devices, there are {num_devices}")
        return dataclasses.replace(self, data=data)


def make_mesh(config: MeshConfig, devices: Optional[Sequence[Any]] = None) -> Mesh:
    """The explicit mesh of `config` on `devices` (default: the first that JAX lists).

    Slices of TPUs lie along `data`: the network between them is slow, and gradients alone cross it, once a step.

    Raises:
      ConfigError: as `resolve`, or `data` is not a multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = config.resolve(len(devices))
    idle = len(devices) > math.prod(config.shape)
    devices = devices[: math.prod(config.shape)]
    types = (AxisType.Explicit,) * len(AXES)
    on_tpu = devices[0].platform == "tpu"  # GPUs count as slices what NVLink connects, and find their own ways
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if on_tpu and idle and slices == 1:  # which part of a slice this is, JAX cannot lay a mesh into
        return Mesh(np.array(devices).reshape(config.shape), AXES, axis_types=types)
    if not on_tpu:
        return jax.make_mesh(config.shape, AXES, axis_types=types, devices=devices)
    split = {"allow_split_physical_axes": True}  # 8 × 8 on a torus of 4 × 4 × 4
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(config.shape, devices, **split), AXES, axis_types=types)
    check_slices(config, slices)
    of_one = (config.data // slices, config.expert, config.tensor)
    laid = mesh_utils.create_hybrid_device_mesh(of_one, (slices, 1, 1), devices, **split)
    return Mesh(laid, AXES, axis_types=types)


def check_slices(config: MeshConfig, slices: int) -> None:
    """Raises `ConfigError` unless each slice holds an equal part of the mesh axis `data`."""
    if config.data % slices:
        raise ConfigError("mesh.data", f"{config.data} is not a multiple of the {slices} slices, which lie along it")


def mesh_platform() -> str:
    """What the mesh in force is made of: 'cpu', 'gpu' or 'tpu'. A mesh of devices that are only described counts,
    too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_each_device(
    function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: tuple[Any, ...], check_vma: bool = True
) -> Callable[..., Any]:
    """`jax.shard_map`; on a mesh of one device the function itself, which then must not name the mesh axes: XLA for CPU
    keeps collectives among one device, and each is a copy."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

    def alone(*operands: Any) -> Any:
        whole = jax.tree.map(lambda array: jax.sharding.reshard(array, P()), operands)
        back = lambda spec, part: jax.tree.map(lambda array: jax.sharding.reshard(array, spec), part)  # noqa: E731
        return tuple(back(spec, part) for spec, part in zip(out_specs, function(*whole), strict=True))

    return alone


def sum_over(tree: Any, axes: str | tuple[str, ...]) -> Any:
    """The sum over mesh axes, inside `on_each_device`."""
    return jax.lax.psum(tree, axes) if jax.sharding.get_abstract_mesh().size > 1 else tree


def split_axes(array: Array) -> P:
    """The mesh axes that `on_each_device` finds a stored array split over: none on a mesh of one device."""
    return jax.typeof(array).sharding.spec if jax.sharding.get_abstract_mesh().size > 1 else P()


def whole(value: Array, spec: P, like: Array, over: Sequence[str] = ("data",)) -> Array:
    """Inside `on_each_device`: a parameter stored as `spec`, gathered over the mesh axes `over` for use beside `like`.

    It varies as `like` does before it is gathered. So its gradient is scattered over the axes it was gathered from, and
    only what is left is summed over the others; the other way round whole gradients would travel."""
    value = vary_like(value, like)
    for place, axis in enumerate(spec):
        if axis in over:
            value = jax.lax.all_gather(value, axis, axis=place, tiled=True)
    return value


def vary_like(value: Array, like: Array) -> Array:
    """Inside `shard_map`: `value`, typed as varying over every mesh axis `like` varies over, so that its cotangent
    may."""
    missing = tuple(jax.typeof(like).manual_axis_type.varying - jax.typeof(value).manual_axis_type.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, accumulation: int) -> dict[str, Array]:
    """Host arrays of this process's rows (`host_rows`) → global arrays `[A, B/A, …]`, rows split over the batch
    axes."""
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))
    parts = mesh.shape["data"] * mesh.shape["expert"]
    held = len(host_rows(mesh, parts, 1))

    def globally(rows: np.ndarray) -> Array:
        local = rows.reshape(accumulation, rows.shape[0] // accumulation, *rows.shape[1:])
        shape = (accumulation, local.shape[1] * parts // held, *local.shape[2:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return {name: globally(rows) for name, rows in batch.items()}


def host_rows(mesh: Mesh, batch_size: int, accumulation: int) -> np.ndarray:
    """The rows of a batch that this process reads, ascending: of every microbatch, those that its devices hold."""
    size = batch_size // accumulation
    held = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[index] for index in held]))
    return np.concatenate([part * size + rows for part in range(accumulation)])


def zeros_of(function: Callable[..., Any], *args: Any) -> Any:
    """Zeros in the shapes, dtypes and layouts of what `function` would return."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)


def to_numpy(array: Any) -> np.ndarray:
    """A global array on the host. Where other processes hold parts of it, all of them make the call."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
