"""Selectors that look a token's experts up, whatever the network thinks of it."""

from dataclasses import dataclass

import jax.numpy as jnp

from sparsejax.ops.assignment import Pairs, choice_major_pairs
from sparsejax.ops.hashing import mix
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits


@dataclass(frozen=True, kw_only=True)
class Hash(ChoosesK):
    """A fixed random choice of k experts for every vocabulary id (Hash Layers, arXiv:2106.04426).

    A token's experts never change with context, position or training. With weight=constant there is no router at all;
    with another weight the scores of the looked-up experts are used, as in DeepSeek-V4."""

    k: int = 1
    seed: int = 42

    traits = Traits(needs=frozenset({"tokens"}), fixed=True)

    def __call__(self, candidates: Candidates) -> Pairs:
        return _look_up(candidates, candidates.inputs.tokens, self.k, self.seed)


@dataclass(frozen=True, kw_only=True)
class ByDomain(ChoosesK):
    """All tokens of a document go to the experts of its domain (DEMix, arXiv:2108.05036): domain mod E, and the k − 1
    that follow."""

    k: int = 1

    traits = Traits(needs=frozenset({"domains"}), fixed=True)

    def __call__(self, candidates: Candidates) -> Pairs:
        num_experts = candidates.scores.shape[-1]
        experts_GSK = (candidates.inputs.domains[..., None] + jnp.arange(self.k, dtype=jnp.int32)) % num_experts
        scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, scores_GSK, candidates.inputs.mask)


def _look_up(candidates: Candidates, keys_GS, k: int, seed: int) -> Pairs:
    """The k experts whose hash with the key is largest: distinct, and each equally likely."""
    num_experts = candidates.scores.shape[-1]
    hashed_GSE = mix(keys_GS[..., None].astype(jnp.uint32), jnp.arange(num_experts, dtype=jnp.uint32), seed)
    experts_GSK = jnp.argsort(hashed_GSE, axis=-1, descending=True)[..., :k]
    scores_GSK = jnp.take_along_axis(candidates.scores, experts_GSK, axis=-1)
    return choice_major_pairs(experts_GSK, scores_GSK, candidates.inputs.mask)
