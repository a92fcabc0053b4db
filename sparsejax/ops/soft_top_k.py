"""Weights between 0 and 1 that add up to about k, with gradients: the selector of CoLT5 and CoDA."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.base.structs import struct


@struct
class SoftTopK:
    weights: Float[Array, "*B N"]  # in [0, 1]
    residual: Float[Array, "*B"]  # |Σ weights − k|: how far the iteration is from its constraint


def soft_top_k(
    scores: Float[Array, "*B N"],
    k: float,
    mask: Optional[Bool[Array, "*B N"]] = None,
    *,
    epsilon: float = 0.03,
    start: float = 4.0,
    decay: float = 0.7,
    iterations: int = 20,
) -> SoftTopK:
    """The λ that maximise s · λ + ε H(λ) with Σ λ = k and 0 ≤ λ ≤ 1, by coordinate descent in the dual, float32
    (CoDA, arXiv:2304.04947, after arXiv:2211.01267): a ← ε (log k − logsumexp((s + b) / ε)), b ← −relu(s + a) from
    b = −s on, λ = exp((s + a + b) / ε).

    ε falls from `start` by a factor of `decay` an iteration and stays at `epsilon`; `start` = `epsilon` keeps it fixed,
    which is far from converged where it is small. λ → the k largest as ε → 0. Masked entries get 0; where no more than
    k are left, all of them get 1, and k in the residual is their number. Gradients go through the iteration. Raises
    `ValueError` when ε does not reach `epsilon` or a number is not positive."""
    if min(k, epsilon, decay, iterations) <= 0:
        raise ValueError(f"k={k}, epsilon={epsilon}, decay={decay} and iterations={iterations} must be positive")
    steps = [max(start * decay**i, epsilon) for i in range(iterations)]
    if steps[-1] > epsilon:
        raise ValueError(f"{iterations} iterations from {start} end at {steps[-1]:.3g}, above epsilon={epsilon}")
    s = scores.astype(jnp.float32)
    mask = jnp.ones(s.shape, bool) if mask is None else mask
    s = jnp.where(mask, s, 0)

    def step(b, eps):
        a = eps * (jnp.log(k) - jax.nn.logsumexp((s + b) / eps, axis=-1, keepdims=True, where=mask))
        return -jax.nn.relu(s + a), a

    b, a = jax.lax.scan(step, -s, jnp.asarray(steps, jnp.float32))
    count = mask.sum(-1)
    iterated = jnp.exp((s + a[-1] + b) / epsilon)
    weights = jnp.where(mask, jnp.where((count <= k)[..., None], 1.0, iterated), 0)
    residual = jnp.abs(weights.sum(-1) - jnp.minimum(k, count))
    return SoftTopK(weights=weights, residual=jax.lax.stop_gradient(residual))
