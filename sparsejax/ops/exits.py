"""How sure a model is, and how sure it has to be to leave early, by position."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def largest_two(values: Float[Array, "*N V"]) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """The largest and the second largest, which are equal in a tie. `jax.lax.top_k` sorts for them: of 256 values it
    takes ten times as long on a CPU."""
    largest = values.max(-1, keepdims=True)
    at_largest = values == largest
    second = jnp.where(at_largest, -jnp.inf, values).max(-1)
    return largest[..., 0], jnp.where(at_largest.sum(-1) > 1, largest[..., 0], second)


def decaying_threshold(
    threshold: float | Float[Array, "*#N"],
    position: Int[Array, "*N"],
    length: int | Int[Array, "*#N"],
    temperature: float = 4.0,
) -> Float[Array, "*N"]:
    """clip(0.9 · λ + 0.1 · exp(−τ t / N), 0, 1) for generated token t of at most N: early tokens, whose errors later
    ones would see, have to be surer (CALM, arXiv:2207.07061). λ = 1 stays 1: the full model at every position."""
    decayed = 0.9 * threshold + 0.1 * jnp.exp(-temperature * position / length)
    return jnp.where(jnp.asarray(threshold) >= 1, 1.0, jnp.clip(decayed, 0, 1))
