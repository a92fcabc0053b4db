"""Selectors in which experts take tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparsejax.ops.assignment import Pairs
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(ChoosesK):
    """Each expert fills its slots with the tokens of the group that score highest for it (Zhou et al.,
    arXiv:2202.09368). A token may get any number of experts, also none: `k` is the mean when the capacity factor is 1.

    Whether a token is taken depends on the tokens after it, so this is not for causal models. Slots are the selection
    here: evaluation has those of training, and generation, token by token, takes each token's k best experts."""

    k: int = 2

    traits = Traits(causal=False, variable_k=True, fits=True)

    def __call__(self, candidates: Candidates) -> Pairs:
        inputs = candidates.inputs
        groups, size, num_experts = candidates.ranking.shape
        num_slots = inputs.num_slots
        ranking_GES = jnp.where(inputs.mask[..., None], candidates.ranking, -jnp.inf).transpose(0, 2, 1)
        taken_GEC, token_GEC = jax.lax.top_k(ranking_GES, num_slots)
        # Neither padding nor what a limit excludes.
        chosen_GEC = jnp.isfinite(taken_GEC) & (jnp.arange(num_slots) < inputs.limit[:, None, None])
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
