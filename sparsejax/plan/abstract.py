"""Stand-ins for what a step runs on, made of shapes: a mesh without devices and a batch without data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import AXES, BATCH_AXES, MeshConfig
from sparsejax.base.structs import LOADED
from sparsejax.train.config import ExperimentConfig


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The explicit mesh of `config`, without devices."""
    return AbstractMesh(config.shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_batch(config: ExperimentConfig, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of `Batch` for a whole step, `[A, B, …]`, as the training loop puts them on the mesh."""
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))
    rows = (config.train.accumulation, config.microbatch_size)
    tokens = (*rows, config.data.sequence_length)
    shapes = dict.fromkeys(LOADED, (tokens, jnp.int32))
    shapes |= {"loss_mask": (tokens, jnp.bool_), "rows": (rows, jnp.int32)}
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def device_shape(array: Any) -> tuple[int, ...]:
    """What each device holds of an array given by shape, dtype and sharding: splits are even on explicit meshes."""
    return array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)


def device_bytes(array: Any) -> int:
    """The bytes of that."""
    return math.prod(device_shape(array)) * array.dtype.itemsize
