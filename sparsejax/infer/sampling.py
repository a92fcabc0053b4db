"""How the next token is drawn from its logits, as pure functions of one row."""

import math
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Softmax at a temperature, over the k likeliest tokens, over the fewest of these that have probability `top_p`."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: Optional[int] = None  # None: all
    top_p: Optional[float] = None  # in [0, 1], of what top_k leaves; None: all

    def __post_init__(self):
        if not self.temperature >= 0:
            raise RequestError(f"temperature={self.temperature} is negative; allowed: 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k={self.top_k} leaves no token; allowed: 1 or more")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p} is no probability; allowed: 0 to 1")


def sample(key: PRNGKeyArray, logits_V: Float[Array, " V"], sampling: Sampling) -> Int[Array, ""]:
    """A token drawn from float32 logits, int32. Among equal logits the lowest id comes first.

    The noise belongs to token ids: top_k and top_p change the draw only where they forbid what it would have been.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    return jax.random.categorical(key, _allowed(logits_V, sampling)).astype(jnp.int32)


def distribution(logits_V: Float[Array, " V"], sampling: Sampling) -> Float[Array, " V"]:
    """The probabilities that `sample` draws with; one of them is 1 at temperature 0."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits_V), logits_V.shape[0])
    return jax.nn.softmax(_allowed(logits_V, sampling))


def _allowed(logits_V: Float[Array, " V"], sampling: Sampling) -> Float[Array, " V"]:
    """At the temperature, −∞ for tokens that may not be drawn."""
    # The largest becomes 0 first, so that no temperature is too small.
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits_V
    return jnp.where(likeliest(logits_V, sampling.top_k, sampling.top_p), logits_V, -math.inf)


def likeliest(logits_V: Float[Array, " V"], top_k: Optional[int], top_p: Optional[float]) -> Bool[Array, " V"]:
    """The tokens that may be drawn; the likeliest always may.

    Of the `top_k` likeliest (ties by id: never more than k), those that have less than `top_p` of their probability
    before them.
    """
    by_rank_V = jnp.argsort(logits_V, descending=True, stable=True)
    rank_V = jnp.arange(logits_V.shape[0])
    keep_V = rank_V < (logits_V.shape[0] if top_k is None else top_k)
    if top_p is not None and top_p < 1:
        p_V = jax.nn.softmax(jnp.where(keep_V, logits_V[by_rank_V], -math.inf))
        keep_V &= (jnp.cumsum(p_V) - p_V < top_p) | (rank_V == 0)
    return jnp.zeros_like(keep_V).at[by_rank_V].set(keep_V)
