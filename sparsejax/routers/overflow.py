"""Axis 4, slots, part two: what becomes of a pair whose expert is full.

The ledger and the balance losses go by what the router chose: a pair that was sent on is assigned to, and processed
for, its first choice, so that sending on flatters no load."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.ops.assignment import Pairs, Slots, fill_slots
from sparsejax.routers.candidates import Candidates, Selector, Traits


class Overflow(Protocol):
    @property
    def traits(self) -> Traits: ...

    def check(self, selection: Selector) -> None:
        """Raises `ConfigError` when pairs of this selection cannot be treated so."""
        ...

    def __call__(self, pairs: Pairs, candidates: Candidates) -> tuple[Pairs, Slots, Int[Array, "G P"]]:
        """(pairs in the order in which slots are filled, their slots, the expert that the router chose for each). The
        counts of the slots are by the expert that was chosen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Drop:
    """It is dropped: the experts return 0 for it, and the residual stream carries the token on."""

    traits = Traits()

    def check(self, selection: Selector) -> None:
        pass

    def __call__(self, pairs: Pairs, candidates: Candidates) -> tuple[Pairs, Slots, Int[Array, "G P"]]:
        return pairs, _fill(pairs, candidates), pairs.expert


@dataclass(frozen=True, kw_only=True)
class NextBest:
    """It is sent on to the best expert that still has free slots, up to `rounds` times (no token left behind, Switch,
    arXiv:2101.03961; Mesh-TensorFlow). Its weight is the score of the expert it ends up with.

    Free slots are those that first choices left, also the choices of later tokens, so this is not for causal models.
    After E − 1 rounds a token is dropped only if no slot of the group is free. For one expert per token: with more, an
    expert could be reached twice."""

    rounds: int = 4

    traits = Traits(causal=False)

    def __post_init__(self):
        if self.rounds < 1:
            raise ConfigError("rounds", f"{self.rounds} is not positive; for no round choose overflow = 'drop'")

    def check(self, selection: Selector) -> None:
        if selection.experts_per_token != 1:
            raise ConfigError("", f"next_best sends on single experts, not {selection.experts_per_token} of a token")
        if selection.traits.beyond_k:
            raise ConfigError("", "next_best sends on single experts, and a token may have several; allowed: most=1")
        if selection.traits.fits or selection.traits.fixed:
            raise ConfigError("", "next_best goes by the ranking of tokens that chose their expert themselves")

    def __call__(self, pairs: Pairs, candidates: Candidates) -> tuple[Pairs, Slots, Int[Array, "G P"]]:
        if candidates.inputs.generating:  # there is a slot for every token
            return Drop()(pairs, candidates)
        first = _fill(pairs, candidates)
        expert_GP = self._sent_on(pairs, first, candidates)
        group_G1 = jnp.arange(pairs.token.shape[0])[:, None]
        score_GP = candidates.scores[group_G1, pairs.token, expert_GP]
        weight_GP = jnp.where(expert_GP == pairs.expert, pairs.weight, score_GP)
        # In any order: no more arrive than there is room for, and where somebody waits in vain, nobody arrived.
        sent = dataclasses.replace(pairs, expert=expert_GP, weight=weight_GP)
        return sent, _by_choice(_fill(sent, candidates), pairs.expert, first), pairs.expert

    def _sent_on(self, pairs: Pairs, first: Slots, candidates: Candidates) -> Int[Array, "G P"]:
        """Each pair's expert in the end: the first choice, too, of those for whom there was no room anywhere."""
        expert_E = jnp.arange(candidates.ranking.shape[-1], dtype=jnp.int32)
        ranking_GPE = jnp.take_along_axis(candidates.ranking, pairs.token[..., None], axis=1)
        filled_GE = (first.pair < pairs.token.shape[1]).sum(-1, dtype=jnp.int32)

        def send(_, state):
            expert_GP, waits_GP, free_GE = state
            open_GPE = jnp.where(free_GE[:, None] > 0, ranking_GPE, -jnp.inf)
            best_GP = jnp.argmax(open_GPE, axis=-1).astype(jnp.int32)
            asks_GP = waits_GP & jnp.isfinite(open_GPE.max(-1))
            asks_GPE = ((best_GP[..., None] == expert_E) & asks_GP[..., None]).astype(jnp.int32)
            before_GPE = jnp.cumsum(asks_GPE, axis=1) - asks_GPE
            arrives_GPE = asks_GPE * (before_GPE < free_GE[:, None])
            arrives_GP = arrives_GPE.any(-1)
            return jnp.where(arrives_GP, best_GP, expert_GP), waits_GP & ~arrives_GP, free_GE - arrives_GPE.sum(1)

        free_GE = candidates.inputs.limit[:, None] - filled_GE
        start = (pairs.expert, pairs.valid & ~first.keep, free_GE)
        return jax.lax.fori_loop(0, self.rounds, send, start)[0]


def _fill(pairs: Pairs, candidates: Candidates) -> Slots:
    inputs = candidates.inputs
    return fill_slots(pairs, candidates.scores.shape[-1] - inputs.free, inputs.num_slots, inputs.limit)


def _by_choice(slots: Slots, chosen_GP: Int[Array, "G P"], first: Slots) -> Slots:
    """`slots` with the counts of the pairs' first choices."""
    groups, num_experts, num_slots = slots.pair.shape
    nobody = num_experts  # an empty slot
    pair_GN = slots.pair.reshape(groups, num_experts * num_slots)
    chosen_GN = jnp.take_along_axis(chosen_GP, pair_GN, axis=-1, mode="fill", fill_value=nobody)
    processed_E = (chosen_GN[..., None] == jnp.arange(num_experts)).sum((0, 1), dtype=jnp.int32)
    return dataclasses.replace(slots, assigned=first.assigned, processed=processed_E)


OVERFLOWS = Registry("overflow", {"drop": Drop, "next_best": NextBest})
