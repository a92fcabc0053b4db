"""Lots: what chance falls by where nothing else decides, in training and, seeded, outside it."""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from sparsejax.base.structs import Batch, struct
from sparsejax.ops.hashing import mix


@struct
class Lots:
    """One number for every token, uint32, of which a choice of experts is a hash: whoever shares it shares the choice.

    They depend on the batch and on a number of the layer's own, which in training is another one in every step."""

    shared: UInt32[Array, "*shape"]  # by all tokens of the layer
    document: UInt32[Array, "*shape"]  # by the tokens of a document
    token: UInt32[Array, "*shape"]  # by nobody


def draw_lots(batch: Batch, number: Int[Array, ""] | UInt32[Array, ""]) -> Lots:
    """`[B, T]`, the same on any mesh and accumulation."""
    shared = jnp.zeros_like(batch.tokens, jnp.uint32) + jnp.asarray(number).astype(jnp.uint32)
    of_row = mix(shared, batch.rows[:, None].astype(jnp.uint32), 0)
    document = mix(of_row, batch.segments.astype(jnp.uint32), 1)
    return Lots(shared=shared, document=document, token=mix(document, batch.positions.astype(jnp.uint32), 2))
