"""Axis 3, correction, part three: a controller of how many experts a token takes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport
from sparsejax.routers.candidates import Selector


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Keeps the share of (token, expert) pairs that are not chosen at 1 − k/E, by an L1 loss on the scores whose
    coefficient is the state (ReMoE, arXiv:2412.14711).

    The loss is λ · Σ_e f_e · (mean score of e), f_e being E/k times the pairs of e per token of the microbatch, so that
    busy experts are pressed more. After a step λ is multiplied with `factor` if the layer was too dense, else divided
    by it. Every layer has a λ of its own. For scores that can be 0, and a selection that leaves those out."""

    initial: float = 1e-8
    factor: float = 1.2

    rows = 2  # nothing is added to the ranking; the logarithm of λ / initial to the base `factor`
    thresholds = False

    def __post_init__(self):
        if self.initial <= 0:
            raise ConfigError("initial", f"{self.initial} is not positive")
        if self.factor <= 1:
            raise ConfigError("factor", f"{self.factor} is not more than 1")

    def check(self, selection: Selector) -> None:
        if not selection.traits.sparse:
            raise ConfigError("", "sparsity moves the number of experts with a positive score; selection=positive")

    def temperature(self, state) -> None:
        return None

    def measure(self, ranking_GSE, mask_GS, k):
        return None

    def pressure(
        self, state: Float[Array, "N E"], scores_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]
    ) -> Float[Array, " E"]:
        strength_E = self.initial * self.factor ** jax.lax.stop_gradient(state[1])
        return strength_E * jnp.where(mask_GS[..., None], scores_GSE, 0).sum((0, 1))

    def loss(self, report: MoEReport, tokens: Int[Array, ""], k: int) -> Float[Array, ""]:
        assert report.pressed_sum is not None  # `pressure` gave it
        in_microbatch = jnp.maximum(report.tokens, 1)[..., None]
        share = report.assigned.shape[-1] / k * report.assigned / in_microbatch
        return (share * report.pressed_sum).sum() / jnp.maximum(tokens, 1)

    def update(self, state: Float[Array, "*R N E"], report: MoEReport, k: int, free: int = 0) -> Float[Array, "*R N E"]:
        # Sparsity against 1 − k/E; a step without tokens moves nothing.
        chosen = report.assigned.sum(-1, dtype=jnp.float32) / jnp.maximum(report.tokens, 1)
        moved = jnp.where(report.tokens > 0, jnp.sign(chosen - k), 0)
        return state.at[..., 1, :].add(moved[..., None])
