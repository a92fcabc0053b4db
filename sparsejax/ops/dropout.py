"""Dropout of hidden layers whose rows and columns are computed wherever a mesh puts them.

Whether a unit stays is a hash of its row's seed and its own number: nothing is drawn in an order, and nothing is kept
for the backward pass."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots
from sparsejax.ops.hashing import mix, uniform


@struct
class Dropout:
    """Of rows with seeds of their own and units with numbers."""

    rate: float | Float[Array, ""]
    seed_N: UInt32[Array, "*N"]
    unit_F: Int[Array, " F"]


def drop_units(hidden_NF: Float[Array, "*N F"], dropout: Dropout) -> Float[Array, "*N F"]:
    """`rate` of the numbers are 0, the others 1 / (1 − rate) times what they were (Srivastava et al. 2014)."""
    drawn_NF = uniform(dropout.seed_N[..., None], dropout.unit_F.astype(jnp.uint32), 0)
    return jnp.where(drawn_NF < dropout.rate, 0, hidden_NF / (1 - dropout.rate)).astype(hidden_NF.dtype)


def rows_drawn(seed: UInt32[Array, ""], rows_B: Int[Array, " B"], rate: float | Float[Array, ""]) -> Bool[Array, " B"]:
    """True for about `rate` of the rows, by their numbers."""
    return uniform(seed, rows_B.astype(jnp.uint32), 0) < rate


def slot_seeds(seed_GS: UInt32[Array, "G S"], pairs: Pairs, slots: Slots) -> UInt32[Array, "E G C"]:
    """The seed of each slot, from that of its token and from its expert; any number where a slot is empty."""
    groups, num_experts, num_slots = slots.pair.shape
    seed_GP = jnp.take_along_axis(seed_GS, pairs.token, axis=-1)
    seed_GN = jnp.take_along_axis(seed_GP, slots.pair.reshape(groups, -1), axis=-1, mode="fill", fill_value=0)
    seed_EGC = seed_GN.reshape(groups, num_experts, num_slots).transpose(1, 0, 2)
    return mix(seed_EGC, jnp.arange(num_experts, dtype=jnp.uint32)[:, None, None], 1)
