"""Parameters with logical axes, and the one linear layer."""

from collections.abc import Sequence
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.sharding import gather_for_compute

Group = Literal["dense", "embedding", "norm", "router", "expert"]
"""What a parameter belongs to: optimizer masks and the parameter table go by it."""


def param(value: Float[Array, "..."], axes: Sequence[Optional[str]], group: Group) -> nnx.Param:
    """A parameter that knows its logical axes (`base.sharding.Rules`) and its group."""
    return nnx.Param(value, axes=tuple(axes), group=group)


def normal(key: PRNGKeyArray, shape: Sequence[int], stddev: float) -> Float[Array, "..."]:
    """Float32 normal values truncated at two standard deviations, `stddev` being that of the untruncated normal."""
    return stddev * jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32)


class Linear(nnx.Module):
    """An einsum with one weight and no bias. `out_spec` is the layout of its output on the mesh."""

    def __init__(
        self,
        key: PRNGKeyArray,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[Optional[str]],
        *,
        stddev: float,
        out_spec: P,
        dtype: str,
        group: Group = "dense",
    ):
        self.weight = param(normal(key, shape, stddev), axes, group)
        self.equation, self.out_spec, self.dtype = equation, out_spec, dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Cast before gathering: half the bytes travel when computing in bfloat16.
        weight = gather_for_compute(self.weight[...].astype(self.dtype))
        return jnp.einsum(self.equation, x.astype(self.dtype), weight, out_sharding=self.out_spec)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32, returned in the dtype of `x` (Zhang & Sennrich,
    arXiv:1910.07467)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = param(jnp.ones(width, jnp.float32), (None,), "norm")
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * self.scale[...]).astype(x.dtype)
