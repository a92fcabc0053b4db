"""What a balance may look at, token by token, and over which tokens it is taken."""

from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.assignment import Pairs, by_token
from sparsejax.routers.candidates import Inputs
from sparsejax.routers.scores import Score, as_probabilities

Scope = Literal["sequence", "device", "microbatch", "global"]
LocalScope = Literal["sequence", "device", "microbatch"]
"""For formulas that are not linear in the probabilities: of these a microbatch knows no share of the whole step's."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A decision before capacity."""

    clean: Float[Array, "G S E"]  # logits
    noisy: Float[Array, "G S E"]  # the same with noise
    spread: Optional[Float[Array, "G S E"]]  # what the noise was multiplied with; None where there is none
    probabilities: Float[Array, "G S E"]  # of the noisy logits
    score: Score
    pairs: Pairs  # weights are scores
    inputs: Inputs
    k: int
    parts: int = 1  # groups of experts, of which each has the same share of the probabilities
    selectors: Optional[Float[Array, "G S N E"]] = None  # of the logits, where the balance needs them

    def clean_probabilities(self) -> Float[Array, "G S E"]:
        return as_probabilities(self.score(self.clean), self.parts)

    def first_choices(self) -> Float[Array, "G S E"]:
        """1 at each token's first expert."""
        first_GS, taken_GS = (by_token(x, self.pairs)[..., 0] for x in (self.pairs.expert, self.pairs.valid))
        return jax.nn.one_hot(first_GS, self.clean.shape[-1]) * taken_GS[..., None]

    def selected(self) -> Float[Array, "G S E"]:
        """1 at each expert of a token."""
        experts_GSK, taken_GSK = (by_token(x, self.pairs) for x in (self.pairs.expert, self.pairs.valid))
        return jnp.sum(jax.nn.one_hot(experts_GSK, self.clean.shape[-1]) * taken_GSK[..., None], axis=-2)

    def gates(self) -> Float[Array, "G S E"]:
        """Scores of the selected over their sum, 0 elsewhere."""
        experts_GSK = by_token(self.pairs.expert, self.pairs)
        scores_GSK = by_token(jnp.where(self.pairs.valid, self.pairs.weight, 0), self.pairs)
        gates_GSK = scores_GSK / jnp.maximum(scores_GSK.sum(-1, keepdims=True), 1e-9)
        return jnp.sum(jax.nn.one_hot(experts_GSK, self.clean.shape[-1]) * gates_GSK[..., None], axis=-2)
