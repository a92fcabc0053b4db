"""How a router learns without a gate: from the losses of the tokens it chose for."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.base.reports import MoEReport
from sparsejax.nn.linear import param


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """REINFORCE (Williams 1992) with a learned baseline b(x) = v · x + c of the router's input.

    The reward of a token, in every layer, is the log-probability of its target. The loss is, over the tokens that have
    one, policy · mean(−(reward − b) · log π) + baseline · mean((reward − b)²), less entropy · the mean entropy of π.
    The reward has no gradient, the baseline none but that of its own error, and this none beyond v and c."""

    policy: float
    baseline: float
    entropy: float

    def init(self, d_model: int) -> dict[str, nnx.Param]:
        """Zeros: the first steps have no baseline."""
        return {
            "baseline_weight": param(jnp.zeros(d_model, jnp.float32), ("embed",), "router"),
            "baseline_bias": param(jnp.zeros((), jnp.float32), (), "router"),
        }

    def size(self, d_model: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        return d_model + 1, d_model

    def expected(
        self, x_GSD: Float[Array, "G S D"], parameters: Mapping[str, Float[Array, "..."]]
    ) -> Float[Array, "G S"]:
        """The reward to be expected of each token."""
        v_D = parameters["baseline_weight"]
        # At full precision, as everything of the router.
        dot_GS = jnp.einsum("gsd,d->gs", jax.lax.stop_gradient(x_GSD), v_D, precision=jax.lax.Precision.HIGHEST)
        return dot_GS + parameters["baseline_bias"]

    def losses(self, moe: MoEReport, targets: Int[Array, ""], tokens: Int[Array, ""]) -> dict[str, Float[Array, ""]]:
        """What a microbatch adds to the step's loss, from its report of sums; `targets` and `tokens` are the step's."""
        assert moe.policy_sum is not None and moe.baseline_sum is not None  # `scored` has seen it
        targets = jnp.maximum(targets, 1)
        terms = {
            "policy": self.policy * moe.policy_sum.sum() / targets,
            "baseline": self.baseline * moe.baseline_sum.sum() / targets,
        }
        entropy = -self.entropy * moe.entropy_sum.sum() / jnp.maximum(tokens, 1)
        return terms | ({"entropy": entropy} if self.entropy else {})
