"""Selectors that share the tokens of a group out among experts, all at once. They are for training: evaluation, which
must not depend on what else is in the batch, takes each token's best experts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs, choice_major_pairs
from sparsejax.ops.matching import auction, sinkhorn
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(ChoosesK):
    """The k best experts of each token in a balanced transport plan (S-BASE, arXiv:2202.01169), the weight being the
    score as ever. The plan is balanced; its best entries are so the more, the lower the temperature."""

    k: int = 1
    iterations: int = 8
    temperature: float = 1.0

    traits = Traits(causal=False, train_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise ConfigError("iterations", f"{self.iterations} is not positive")
        if self.temperature <= 0:
            raise ConfigError("temperature", f"{self.temperature} is not positive")

    def __call__(self, candidates: Candidates) -> Pairs:
        mask_GS = candidates.inputs.mask
        plan = lambda logits, mask: sinkhorn(logits, mask, self.iterations, self.temperature)  # noqa: E731
        plan_GSE = jax.vmap(plan)(candidates.logits, mask_GS)
        _, experts_GSK = jax.lax.top_k(plan_GSE, self.k)
        scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, scores_GSK, mask_GS)


ROUNDS = 200
"""Of an auction. Random logits of 4096 tokens and 64 experts need 90, logits that all tokens have in common 2000."""


@dataclass(frozen=True, kw_only=True)
class BalancedAssignment:
    """One expert for each token such that every expert has the same number of them and the sum of logits is within
    S · ε of the best (BASE layers, arXiv:2103.16716). ε is `precision` times the range of the logits.

    Where tokens are so alike that the auction goes on for long, it is stopped, and who is left takes a free slot."""

    precision: float = 0.02

    experts_per_token = 1
    traits = Traits(causal=False, train_only=True)

    def __post_init__(self):
        if not 0 < self.precision <= 1:
            raise ConfigError("precision", f"{self.precision} is outside (0, 1]")

    def __call__(self, candidates: Candidates) -> Pairs:
        mask_GS, logits_GSE = candidates.inputs.mask, candidates.logits
        size, num_experts = logits_GSE.shape[1:]
        slots = -(-size // num_experts)
        limit_G = -(-mask_GS.sum(-1, dtype=jnp.int32) // num_experts)
        # In units of ε, so that a constant can be handed on, and from 0, so that float32 tells them apart.
        real_GS1, axes = mask_GS[..., None], (1, 2)
        highest = jnp.where(real_GS1, logits_GSE, -jnp.inf).max(axes, keepdims=True)
        lowest = jnp.where(real_GS1, logits_GSE, jnp.inf).min(axes, keepdims=True)
        spread = jnp.maximum(highest - lowest, 1e-30)
        unit_GSE = (logits_GSE - lowest) / (self.precision * spread)
        assign = lambda scores, mask, limit: auction(scores, mask, limit, slots, 1.0, ROUNDS)  # noqa: E731
        held_GS = jax.vmap(assign)(unit_GSE, mask_GS, limit_G)
        experts_GSK = jnp.minimum(held_GS, num_experts - 1)[..., None].astype(jnp.int32)
        scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, scores_GSK, mask_GS, (held_GS < num_experts)[..., None])
