"""Random numbers from one key or from one key for each row, as noise of the usual kinds."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

SMALLEST = 2**-24
"""Half a step off 0, where the inverse of a distribution is infinite."""


def uniform(key: PRNGKeyArray, shape: Sequence[int]) -> Float[Array, "..."]:
    """Numbers of U[0, 1), float32.

    A `key` with axes of its own is one key for each of the leading axes of `shape`: rows then draw the same numbers
    wherever they lie, on any mesh and in any microbatch. Raises `ValueError` when they do not agree."""
    leading = key.shape
    if tuple(shape[: len(leading)]) != leading:
        raise ValueError(f"keys of shape {leading} do not lead the shape {tuple(shape)}")
    draw = lambda one: jax.random.uniform(one, tuple(shape[len(leading) :]))  # noqa: E731
    for _ in leading:
        draw = jax.vmap(draw)
    return draw(key)


def gumbel(uniform: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Standard Gumbel noise: the argmax of log p + noise is a draw from p."""
    return -jnp.log(-jnp.log(jnp.maximum(uniform, SMALLEST)))


def logistic(uniform: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Standard logistic noise, the difference of two Gumbels: θ + noise > 0 with probability σ(θ)."""
    inside = jnp.clip(uniform, SMALLEST, 1 - SMALLEST)
    return jnp.log(inside) - jnp.log1p(-inside)
