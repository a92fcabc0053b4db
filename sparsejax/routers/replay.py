"""Decisions kept, and taken again: a replayed token goes to the experts it once went to, with weights of its scores now
(router replay, arXiv:2510.11370)."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.reports import Decisions
from sparsejax.ops.assignment import Pairs, Slots, by_token, choice_major_pairs
from sparsejax.routers.candidates import Candidates, Traits
from sparsejax.routers.policy import policy


class Decided(Protocol):
    """What is kept of a `router.Decision`."""

    @property
    def pairs(self) -> Pairs: ...

    @property
    def slots(self) -> Slots: ...

    @property
    def ranking_GSE(self) -> Float[Array, "G S E"]: ...

    @property
    def processed(self) -> Bool[Array, "G P"]: ...


def record(decision: Decided, rows: int) -> Decisions:
    """The decision for the tokens of so many rows, token by token."""
    pairs, num_experts = decision.pairs, decision.ranking_GSE.shape[-1]
    groups = len(pairs.token)  # dropless: one
    ranking_GSE = decision.ranking_GSE.reshape(groups, -1, num_experts)
    rows_first = lambda values_GSx: values_GSx.reshape(rows, -1, *values_GSx.shape[2:])  # noqa: E731
    experts_GSK = jnp.where(by_token(pairs.valid, pairs), by_token(pairs.expert, pairs), -1)
    of_pairs_GP = ranking_GSE[jnp.arange(groups)[:, None], pairs.token, pairs.expert]
    chosen_GSE = (experts_GSK[..., None] == jnp.arange(num_experts)).any(-2)
    lowest_GS = jnp.where(chosen_GSE, ranking_GSE, jnp.inf).min(-1)
    decisions = Decisions(
        experts=rows_first(experts_GSK),
        ranking=rows_first(by_token(of_pairs_GP, pairs)),
        weights=rows_first(by_token(pairs.weight, pairs)),
        kept=rows_first(by_token(decision.processed, pairs)),
        best=rows_first(ranking_GSE.max(-1)),
        margin=rows_first(lowest_GS - jnp.where(chosen_GSE, -jnp.inf, ranking_GSE).max(-1)),
    )
    return jax.lax.stop_gradient(decisions)


def replay(candidates: Candidates, experts_GSK: Int[Array, "G S K"], traits: Traits) -> Pairs:
    """The pairs of recorded experts, −1 for none, with the scores that a selection of these traits gives them now."""
    if traits.reinforce:
        candidates = dataclasses.replace(candidates, scores=policy(candidates))
    scores_GSK = traits.scores_of(candidates, experts_GSK)
    return choice_major_pairs(jnp.maximum(experts_GSK, 0), scores_GSK, candidates.inputs.mask, experts_GSK >= 0)
