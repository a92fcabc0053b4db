"""Selectors in which experts take tokens."""

from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs
from sparsejax.ops.matching import token_prices
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(ChoosesK):
    """Each expert fills its slots with the tokens of the group that score highest for it (Zhou et al.,
    arXiv:2202.09368). A token may get any number of experts, also none: `k` is the mean when the capacity factor is 1.

    Whether a token is taken depends on the tokens after it, so this is not for causal models. Slots are the selection
    here: evaluation has those of training, and generation, token by token, takes each token's k best experts.

    With `cap`, no token gets more experts than that (the paper's capped variant): scores are lowered by the prices of
    tokens in the entropic plan of `temperature` that keeps to it. Of the few experts that still come too many to a
    token the worst leave, with a slot that stays empty."""

    k: int = 2
    cap: Optional[int] = None
    iterations: int = 100
    temperature: float = 0.02

    traits = Traits(causal=False, beyond_k=True, fits=True)

    def __post_init__(self):
        super().__post_init__()
        if self.cap is not None and self.cap < self.k:
            raise ConfigError("cap", f"{self.cap} is less than k={self.k}, the mean")
        if self.iterations < 1:
            raise ConfigError("iterations", f"{self.iterations} is not positive")
        if self.temperature <= 0:
            raise ConfigError("temperature", f"{self.temperature} is not positive")

    def unused(self) -> dict[str, str]:
        return dict.fromkeys(("iterations", "temperature"), "there is no cap") if self.cap is None else {}

    def __call__(self, candidates: Candidates) -> Pairs:
        inputs = candidates.inputs
        groups, size, num_experts = candidates.ranking.shape
        num_slots = inputs.num_slots
        ranking_GSE = candidates.ranking
        if self.cap is not None:
            settings = {"cap": self.cap, "iterations": self.iterations, "temperature": self.temperature}
            prices = jax.vmap(lambda *group: token_prices(*group, **settings))
            ranking_GSE = ranking_GSE - prices(ranking_GSE, inputs.mask, inputs.limit)[..., None]
        ranking_GES = jnp.where(inputs.mask[..., None], ranking_GSE, -jnp.inf).transpose(0, 2, 1)
        taken_GEC, token_GEC = jax.lax.top_k(ranking_GES, num_slots)
        # Neither padding nor what a limit excludes.
        chosen_GEC = jnp.isfinite(taken_GEC) & (jnp.arange(num_slots) < inputs.limit[:, None, None])
        if self.cap is not None:
            chosen_GEC = _within_cap(chosen_GEC, token_GEC, jax.lax.stop_gradient(candidates.scores), self.cap)
        expert_GEC = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token_GEC.shape)
        flat = lambda values_GEC: values_GEC.reshape(groups, num_experts * num_slots)  # noqa: E731
        pair_GP = jnp.broadcast_to(
            jnp.arange(num_experts * num_slots, dtype=jnp.int32), (groups, num_experts * num_slots)
        )
        nobody_GSE = jnp.full((groups, size, num_experts), num_experts * num_slots, jnp.int32)
        group_G1 = jnp.arange(groups)[:, None]
        token_GP, expert_GP, chosen_GP = flat(token_GEC), flat(expert_GEC), flat(chosen_GEC)
        return Pairs(
            token=token_GP,
            expert=expert_GP,
            weight=jnp.where(chosen_GP, candidates.scores[group_G1, token_GP, expert_GP], 0),
            valid=chosen_GP,
            of_token=nobody_GSE.at[group_G1, token_GP, expert_GP].set(pair_GP, unique_indices=True),
        )


def _within_cap(
    chosen_GEC: Bool[Array, "G E C"], token_GEC: Int[Array, "G E C"], scores_GSE: Float[Array, "G S E"], cap: int
) -> Bool[Array, "G E C"]:
    """The chosen without those whose token has `cap` better experts already."""
    groups, num_experts, _ = chosen_GEC.shape
    places = jnp.arange(groups)[:, None, None], token_GEC, jnp.arange(num_experts)[:, None]
    wanted_GSE = jnp.zeros_like(scores_GSE, bool).at[places].set(chosen_GEC, unique_indices=True)
    _, best_GSK = jax.lax.top_k(jnp.where(wanted_GSE, scores_GSE, -jnp.inf), min(cap, num_experts))
    return chosen_GEC & (best_GSK[..., None] == jnp.arange(num_experts)).any(-2)[places]
