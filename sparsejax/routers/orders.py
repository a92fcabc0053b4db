"""Axis 4, slots: in which order pairs ask for the slots of their expert. Who comes late is dropped.

Selectors write choice-major lists; every other order is a permutation of that list."""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.registry import Registry
from sparsejax.ops.assignment import Pairs, choices, sort_pairs
from sparsejax.routers.candidates import Candidates, Traits


class Order(Protocol):
    @property
    def traits(self) -> Traits: ...

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs: ...


@dataclass(frozen=True, kw_only=True)
class ChoiceMajor:
    """Every token's first choice in token order, then every second choice, … (GShard, Switch, V-MoE).

    For k > 1 a later token's first choice goes before an earlier token's second: what leaks from the future is which
    second choices are dropped. With room for all, nothing does."""

    traits = Traits()

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs:
        return pairs


@dataclass(frozen=True, kw_only=True)
class TokenMajor:
    """All choices of the first token, then all of the second, … (MegaBlocks, MaxText). Causal for any k."""

    traits = Traits()

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs:
        return sort_pairs(pairs, pairs.token)


@dataclass(frozen=True, kw_only=True)
class Priority:
    """Choice-major, tokens with a higher best score first (batch prioritised routing of V-MoE, arXiv:2106.05974)."""

    traits = Traits(causal=False)

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs:
        best_GP = jnp.take_along_axis(candidates.ranking.max(-1), pairs.token, axis=-1)
        return sort_pairs(pairs, -best_GP, choices(pairs))


@dataclass(frozen=True, kw_only=True)
class ByScore:
    """Each expert keeps the pairs of highest score (Megatron's default; Mesh-TensorFlow's switch_max)."""

    traits = Traits(causal=False)

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs:
        return sort_pairs(pairs, -_ranking_of(pairs, candidates))


@dataclass(frozen=True, kw_only=True)
class Random:
    """Each expert keeps a random part of its pairs (Kim et al., arXiv:2109.10465). Outside training: choice-major."""

    traits = Traits(causal=False, needs=frozenset({"noise"}))

    def __call__(self, pairs: Pairs, candidates: Candidates) -> Pairs:
        noise = candidates.inputs.noise
        if noise is None:
            return pairs
        draws_GSK = noise.uniform(2, pairs.of_token.shape[-1])
        groups = pairs.token.shape[0]
        return sort_pairs(pairs, draws_GSK[jnp.arange(groups)[:, None], pairs.token, choices(pairs)])


def _ranking_of(pairs: Pairs, candidates: Candidates) -> Float[Array, "G P"]:
    groups = pairs.token.shape[0]
    return candidates.ranking[jnp.arange(groups)[:, None], pairs.token, pairs.expert]


ORDERS = Registry(
    "order",
    {
        "choice_major": ChoiceMajor,
        "token_major": TokenMajor,
        "priority": Priority,
        "by_score": ByScore,
        "random": Random,
    },
)
