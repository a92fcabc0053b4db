"""REINFORCE (Williams 1992): the gradient of an expected reward from rewards of drawn actions, less a baseline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reinforce_terms(
    log_probability: Float[Array, "*N"], baseline: Float[Array, "*N"], reward: Float[Array, "*N"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """(−(reward − baseline) · log π, (reward − baseline)²) of every action; shapes are broadcast.

    The gradient of the first goes into log π alone, that of the second into the baseline alone: add it to the loss
    where the baseline is learned. The reward has none. Any baseline that does not look at the action leaves the
    expected gradient as it is: 0, `moving_baseline`, a learned one, `leave_one_out`."""
    advantage = jax.lax.stop_gradient(reward) - baseline
    return -jax.lax.stop_gradient(advantage) * log_probability, jnp.square(advantage)


def moving_baseline(
    state: Float[Array, "2"], reward: Float[Array, "*N"], decay: float = 0.99
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """(baseline for these rewards, state after them): the mean of all earlier rewards, recent ones counting most; 0
    before there are any. The state, of zeros at first, is float32 [Σ of what was averaged, Σ of its weights]."""
    state = jax.lax.stop_gradient(state)
    baseline = state[0] / jnp.maximum(state[1], 1e-30)
    now = jnp.stack([jnp.mean(jax.lax.stop_gradient(reward)), jnp.ones(())])
    return baseline, decay * state + (1 - decay) * now


def leave_one_out(reward: Float[Array, "n *N"]) -> Float[Array, "n *N"]:
    """For each of n ≥ 2 independent draws along the first axis the mean reward of the others (Kool et al.
    2019). Raises `ValueError` for one draw."""
    draws = reward.shape[0]
    if draws < 2:
        raise ValueError("a baseline of the other draws needs two draws or more")
    reward = jax.lax.stop_gradient(reward)
    return (reward.sum(0) - reward) / (draws - 1)


def bernoulli_log_probability(logits: Float[Array, "*N"], drawn: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """log p(z) of gates z of {0, 1} that are 1 with probability σ(θ)."""
    drawn = jax.lax.stop_gradient(drawn)
    return drawn * jax.nn.log_sigmoid(logits) + (1 - drawn) * jax.nn.log_sigmoid(-logits)
