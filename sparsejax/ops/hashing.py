"""Integer hashes, in uint32 arithmetic that wraps around on purpose."""

import jax.numpy as jnp
from jaxtyping import Array, UInt


def mix(left: UInt[Array, "*A"], right: UInt[Array, "*B"], seed: int) -> UInt[Array, "*C"]:
    """A hash of two broadcast uint32 arrays: finalised multiply–xorshift rounds (the finaliser of MurmurHash3)."""
    hashed = _finalise(left ^ jnp.uint32(seed & 0xFFFFFFFF))
    return _finalise(hashed * jnp.uint32(0x9E3779B1) + right)


def _finalise(value: UInt[Array, "*A"]) -> UInt[Array, "*A"]:
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)
