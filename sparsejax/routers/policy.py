"""Selectors that draw a token's expert."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import Pairs, choice_major_pairs
from sparsejax.routers.candidates import Candidates, ChoosesK, Traits
from sparsejax.routers.reinforce import Reinforce
from sparsejax.routers.tables import draw


def policy(candidates: Candidates) -> Float[Array, "G S E"]:
    """π: the scores over their sum, of the experts that a token may go to."""
    allowed_GSE = jnp.where(jnp.isneginf(candidates.ranking), 0, candidates.scores)
    return allowed_GSE / jnp.maximum(allowed_GSE.sum(-1, keepdims=True), 1e-30)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One expert drawn from π, the scores over their sum; the likeliest outside training. A pair's score is π of its
    expert. With weight=constant nothing but `Reinforce` moves the router (RL-R of Clark et al., arXiv:2202.01169, after
    Bengio et al., arXiv:1511.06297)."""

    coefficient: float = 0.01  # of the policy's loss
    baseline: float = 0.01  # coefficient of the error of the rewards it expects
    entropy: float = 0.0  # what a nat of the router's mean entropy takes off the loss

    experts_per_token = 1

    def __post_init__(self):
        for name in ("coefficient", "baseline"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")
        if self.entropy < 0:
            raise ConfigError("entropy", f"{self.entropy} is negative; allowed: 0 (off) or more")

    @property
    def traits(self) -> Traits:
        learns = Reinforce(policy=self.coefficient, baseline=self.baseline, entropy=self.entropy)
        return Traits(needs=frozenset({"noise"}), reinforce=learns)

    def __call__(self, candidates: Candidates) -> Pairs:
        noise = candidates.inputs.noise
        pi_GSE = policy(candidates)
        log_GSE = jnp.log(jax.lax.stop_gradient(pi_GSE))
        drawn_GSE = log_GSE if noise is None else log_GSE + noise.gumbel(1, log_GSE.shape[-1])
        experts_GSK = jnp.argmax(drawn_GSE, axis=-1, keepdims=True)
        pi_GSK = jnp.take_along_axis(pi_GSE, experts_GSK, axis=-1)
        return choice_major_pairs(experts_GSK, pi_GSK, candidates.inputs.mask)


@dataclass(frozen=True, kw_only=True)
class Random(ChoosesK):
    """k experts drawn blindly (THOR, arXiv:2110.04260): in training the same for all tokens of a layer's batch, new in
    every step; outside training for each token or each document, always the same in the same place.

    The whole of a step's batch goes to the same experts, over all devices and microbatches, so nothing drops and the
    other experts' slots are empty. Goes with `train.consistency`."""

    k: int = 1
    evaluation: Literal["token", "document"] = "token"  # who draws, outside training
    seed: int = 0

    traits = Traits(needs=frozenset({"lots"}), fixed=True, together=True)

    def __call__(self, candidates: Candidates) -> Pairs:
        lots = candidates.inputs.lots
        assert lots is not None  # the trait says that they are needed
        drawn_GS = lots.shared if candidates.inputs.training else getattr(lots, self.evaluation)
        return draw(candidates, drawn_GS, self.k, self.seed)
