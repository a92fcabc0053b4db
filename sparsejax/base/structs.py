"""`@struct`: a frozen, keyword-only dataclass that JAX treats as a pytree, and the batch every floor agrees on."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax
from jaxtyping import Array, Bool, Int

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def struct(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen keyword-only dataclass, registered with JAX; every field is a child."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@struct
class Batch:
    """One batch of packed rows. Integer arrays are int32. Documents in a row are told apart by `segments`; 0 is
    padding."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]  # restart at 0 with every segment
    loss_mask: Bool[Array, "B T"]  # the target lies in the token's own document
    domains: Int[Array, "B T"]  # the document's domain id, 0 where padded
    rows: Int[Array, " B"]  # the row's number in its batch: 0 .. global batch size - 1; seeds the row's noise
