"""How a loss reaches the logits of a discrete choice: every estimator of that gradient as a function of arrays.

A binary gate z has one logit θ and is on with probability σ(θ); a choice among N has N logits along the last axis.
Each function takes an explicit `key` (or one for each row, see `ops.draws.uniform`) and without one returns what
evaluation uses: no noise, nothing random. All arithmetic is float32. REINFORCE is in `ops.reinforce`, the top-k
relaxation of CoLT5 in `ops.soft_top_k`."""

import math
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.ops import draws

Key = Optional[PRNGKeyArray]
Temperature = float | Float[Array, ""]


def straight_through(hard: Float[Array, "*N"], soft: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """The value of `hard`, to the bit, with the gradient of `soft` (Bengio et al., arXiv:1308.3432)."""
    # Not soft + (hard − soft), which rounds.
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def binary_straight_through(logits: Float[Array, "*N"], key: Key = None) -> Float[Array, "*N"]:
    """z of {0, 1} drawn with probability σ(θ), or θ > 0 without a key; dz/dθ is taken to be σ'(θ)."""
    noisy = logits if key is None else logits + draws.logistic(draws.uniform(key, logits.shape))
    return straight_through(_on(noisy), jax.nn.sigmoid(logits.astype(jnp.float32)))


def one_hot_straight_through(logits: Float[Array, "*B N"], key: Key = None) -> Float[Array, "*B N"]:
    """A one-hot vector drawn from the softmax, or its likeliest entry without a key; the gradient is that of the
    softmax."""
    logits = logits.astype(jnp.float32)
    return straight_through(_best(_with_gumbel(logits, key)), jax.nn.softmax(logits, axis=-1))


def gumbel_softmax(
    logits: Float[Array, "*B N"], key: Key = None, *, temperature: Temperature = 1.0, hard: bool = True
) -> Float[Array, "*B N"]:
    """softmax((θ + Gumbel) / τ) (arXiv:1611.01144, arXiv:1611.00712); `hard`: the one-hot vector of its largest entry,
    with the gradient of the softmax. Without a key there is no noise."""
    noisy = _with_gumbel(logits.astype(jnp.float32), key)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    return straight_through(_best(noisy), soft) if hard else soft


def gumbel_sigmoid(
    logits: Float[Array, "*N"], key: Key = None, *, temperature: Temperature = 1.0, hard: bool = True
) -> Float[Array, "*N"]:
    """σ((θ + logistic noise) / τ): `gumbel_softmax` of two logits whose difference is θ, its first entry."""
    logits = logits.astype(jnp.float32)
    noisy = logits if key is None else logits + draws.logistic(draws.uniform(key, logits.shape))
    soft = jax.nn.sigmoid(noisy / temperature)
    return straight_through(_on(noisy), soft) if hard else soft


def hard_concrete(
    logits: Float[Array, "*N"],
    key: Key = None,
    *,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> Float[Array, "*N"]:
    """A gate in [0, 1] that is exactly 0 or 1 with positive probability: a binary concrete variable stretched to
    (`low`, `high`) and clipped (L0 regularisation, arXiv:1712.01312). Without a key σ(θ) is stretched and clipped.
    Clipped gates have no gradient."""
    logits = logits.astype(jnp.float32)
    if key is None:
        concrete = jax.nn.sigmoid(logits)
    else:
        concrete = jax.nn.sigmoid((logits + draws.logistic(draws.uniform(key, logits.shape))) / temperature)
    return jnp.clip(low + (high - low) * concrete, 0, 1)


def hard_concrete_on(
    logits: Float[Array, "*N"], *, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1
) -> Float[Array, "*N"]:
    """The probability that a drawn `hard_concrete` gate is not 0, with gradient: what its budget counts."""
    return jax.nn.sigmoid(logits.astype(jnp.float32) - temperature * math.log(-low / high))


def gumbel_top_k(logits: Float[Array, "*B N"], k: int, key: Key = None) -> Int[Array, "*B k"]:
    """k distinct indices, int32, in the order drawn: without replacement from the softmax (arXiv:1903.06059), or the
    k largest without a key. No gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(_with_gumbel(logits.astype(jnp.float32), key)), k)[1]


def top_k_indicator(
    scores: Float[Array, "*B N"], k: int, mask: Optional[Bool[Array, "*B N"]] = None
) -> Float[Array, "*B N"]:
    """1 for the k largest unmasked scores, the first of equal ones, 0 elsewhere; all unmasked ones where they are
    fewer."""
    ranked = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    indices = jax.lax.top_k(jax.lax.stop_gradient(ranked), k)[1]
    chosen = jax.nn.one_hot(indices, scores.shape[-1], dtype=jnp.float32).sum(-2)
    return chosen if mask is None else jnp.where(mask, chosen, 0)


def straight_through_top_k(
    scores: Float[Array, "*B N"],
    k: int,
    soft: Optional[Float[Array, "*B N"]] = None,
    mask: Optional[Bool[Array, "*B N"]] = None,
) -> Float[Array, "*B N"]:
    """`top_k_indicator` with the gradient of `soft`, by default of k · softmax(scores): pass the weights of
    `ops.soft_top_k` for theirs."""
    if soft is None:
        logits = scores.astype(jnp.float32)
        soft = k * jax.nn.softmax(logits, axis=-1, where=mask)
    return straight_through(top_k_indicator(scores, k, mask), soft)


def multiplicative_gate(scores: Float[Array, "*N"], chosen: Bool[Array, "*N"]) -> Float[Array, "*N"]:
    """The score of what is chosen, which multiplies its output, and 0 elsewhere: the gradient of mixtures of experts
    and of Mixture-of-Depths, which the paths not taken know nothing of."""
    return jnp.where(chosen, scores, 0)


def learned_temperature_gate(
    logits: Float[Array, "*N 2"], log_temperature: Float[Array, ""]
) -> tuple[Bool[Array, "*N"], Float[Array, "*N"]]:
    """(active, gate): softmax of two logits, idle and active, over a learned temperature (exp of the parameter). Active
    where that is likelier; the gate is the probability of the likelier one, so that it learns without noise (sparse
    modular activation, arXiv:2306.11197)."""
    probability = jax.nn.softmax(logits.astype(jnp.float32) / jnp.exp(log_temperature), axis=-1)
    return probability[..., 1] > probability[..., 0], jnp.max(probability, axis=-1)


def _with_gumbel(logits: Float[Array, "*B N"], key: Key) -> Float[Array, "*B N"]:
    return logits if key is None else logits + draws.gumbel(draws.uniform(key, logits.shape))


def _on(logits: Float[Array, "*N"]) -> Float[Array, "*N"]:
    return (logits > 0).astype(jnp.float32)


def _best(logits: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
