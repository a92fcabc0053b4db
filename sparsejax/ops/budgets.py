"""Losses that make a model of gates spend what it is meant to, and the price of a hard budget.

`activation` a is the part of a module that a token uses, a gate or its probability of being on; `cost` c what all of
the module costs, in FLOPs or any other unit. What is spent is a share of the whole model, so 1 is everything. Sums are
over unmasked tokens; whoever knows the totals divides. A target for every token makes depth uniform, one for the batch
lets tokens differ: they are different regularisers."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Optional[Bool[Array, "*N"]]


def spent(activation: Float[Array, "*N M"], cost: Float[Array, " M"]) -> Float[Array, "*N"]:
    """Σ_m c_m a_m / Σ_m c_m of every token."""
    return activation.astype(jnp.float32) @ (cost / cost.sum())


def linear_sum(spent_N: Float[Array, "*N"], mask: Mask = None) -> Float[Array, ""]:
    """Σ of what is spent: its coefficient is a price (LTP, arXiv:2107.00910; ACT's ponder cost)."""
    return jnp.sum(spent_N, where=mask)


def token_l1_sum(spent_N: Float[Array, "*N"], target: float, mask: Mask = None) -> Float[Array, ""]:
    """Σ |spent − target|: each token has the target (D-LLM)."""
    return jnp.sum(jnp.abs(spent_N - target), where=mask)


def batch_l1(mean: Float[Array, "*R"], target: float) -> Float[Array, "*R"]:
    """|mean − target| of the mean over all unmasked tokens of the global batch."""
    return jnp.abs(mean - target)


def batch_l2(mean: Float[Array, "*R"], target: float) -> Float[Array, "*R"]:
    """(mean − target)² of the mean over all unmasked tokens of the global batch (DynamicViT, arXiv:2106.02034)."""
    return jnp.square(mean - target)


def geometric_prior(rate: float, depths: int) -> Float[Array, " depths"]:
    """The probability of halting at step 1, 2, …: rate · (1 − rate)ⁿ⁻¹, the last step having what is left
    (PonderNet, arXiv:2107.05407). Raises `ValueError` for a rate outside (0, 1]."""
    if not 0 < rate <= 1:
        raise ValueError(f"a rate of {rate} is outside (0, 1]")
    going = (1 - rate) ** jnp.arange(depths, dtype=jnp.float32)
    return jnp.where(jnp.arange(depths) == depths - 1, going, rate * going)


def gaussian_prior(mean: float, deviation: float, depths: int) -> Float[Array, " depths"]:
    """A normal density at depths 1, 2, …, made to add up to 1 (A-ViT, arXiv:2112.07658). Raises `ValueError` for a
    deviation that is not positive."""
    if deviation <= 0:
        raise ValueError(f"a deviation of {deviation} is not positive")
    return jax.nn.softmax(-0.5 * jnp.square((jnp.arange(1, depths + 1, dtype=jnp.float32) - mean) / deviation))


def kl_to_prior(p: Float[Array, "*N M"], prior: Float[Array, " M"]) -> Float[Array, "*N"]:
    """KL(p ‖ prior) in nats; ∞ where p has mass that the prior lacks."""
    inside = p > 0
    # Both logs of 1 where p is 0, or the gradient there would be NaN.
    ratio = jnp.log(jnp.where(inside, p, 1)) - jnp.log(jnp.where(inside, prior, 1))
    return jnp.sum(p * ratio, axis=-1)


def alignment_sum(logits_N: Float[Array, "*N"], selected_N: Bool[Array, "*N"], mask: Mask = None) -> Float[Array, ""]:
    """Σ of the binary cross-entropy, nats, that pulls σ(logit) to 1 for the selected and to 0 for all others
    (Mixture-of-Depths, arXiv:2404.02258)."""
    logits_N = logits_N.astype(jnp.float32)
    each = jax.nn.softplus(jnp.where(selected_N, -logits_N, logits_N))
    return jnp.sum(each, where=mask)


def priced(
    mean: Float[Array, "*R"], price: Float[Array, "*R"], budget: float, damping: float = 0.0
) -> Float[Array, "*R"]:
    """price · (mean − budget) + ½ damping · (mean − budget)²: the Lagrangian's term for spending `budget`. The price
    has no gradient; damping keeps it from swinging about its value."""
    over = mean - budget
    return jax.lax.stop_gradient(price) * over + 0.5 * damping * jnp.square(over)


def next_price(
    price: Float[Array, "*R"],
    mean: Float[Array, "*R"],
    budget: float,
    *,
    rate: float,
    least: float = 0.0,
    most: float = jnp.inf,
) -> Float[Array, "*R"]:
    """Dual ascent, once an optimizer step: λ ← clip(λ + rate · (mean − budget), least, most), without gradient.

    `mean` is what was spent; to hold the budget in evaluation it has to be what evaluation would spend, with gates
    that are not drawn, and the learning rate has to fall. With least = 0 no more than the budget is spent, with a
    negative one neither more nor less."""
    moved = price + rate * (jax.lax.stop_gradient(mean) - budget)
    return jnp.clip(moved, least, most)
