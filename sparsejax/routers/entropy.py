"""Balance by entropies: each token sure of its experts, all tokens together using all of them."""

import math
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.routers.observed import LocalScope, Observed


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """local · mean_t H(p_t) + overall · max(0, log least − H(mean_t p_t)) over the tokens t of one unit, averaged over
    units (LIMoE, arXiv:2206.02770, its local and its thresholded global entropy); reported as 1 plus that over the sum
    of both coefficients.

    Tokens shall spread over `least` experts, by default all. With `domains` > 1 both terms are taken for the tokens of
    each domain (number modulo `domains`) and averaged over the domains that a unit has: LIMoE's modalities."""

    local: float = 0.01
    overall: float = 0.01
    least: Optional[float] = None
    domains: int = 1
    scope: LocalScope = "sequence"

    needs = frozenset()

    def __post_init__(self):
        for name in ("local", "overall"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"{getattr(self, name)} is negative")
        if self.coefficient == 0:
            raise ConfigError("overall", "local and overall are both 0; for no balance loss choose balance = 'none'")
        if self.least is not None and self.least < 1:
            raise ConfigError("least", f"{self.least} is less than one expert")
        if self.domains < 1:
            raise ConfigError("domains", f"{self.domains} is not positive")

    def unused(self) -> dict[str, str]:
        return {} if self.overall else {"least": "overall is 0"}

    @property
    def coefficient(self) -> float:
        return self.local + self.overall

    def measure(self, observed: Observed) -> Float[Array, "G S N E"]:
        """Each domain's probabilities, then each domain's parts of entropies."""
        p_GSE = observed.probabilities
        of_domain = jax.nn.one_hot(observed.inputs.domains % self.domains, self.domains)[..., None]
        return jnp.concatenate([of_domain * x[..., None, :] for x in (p_GSE, _parts(p_GSE))], axis=-2)

    def __call__(self, counts, probability_sum, tokens, k, measured):
        p_sums, entropy_parts = jnp.split(measured, 2, axis=-2)
        tokens_of = p_sums.sum(-1)  # by domain: probabilities of a token add up to 1
        divisor = jnp.maximum(tokens_of, 1e-9)
        least = p_sums.shape[-1] if self.least is None else self.least
        surprise = entropy_parts.sum(-1) / divisor
        missing = jnp.maximum(math.log(least) - _parts(p_sums / divisor[..., None]).sum(-1), 0)
        value = jnp.where(tokens_of > 0, self.local * surprise + self.overall * missing, 0).sum(-1)
        value = value / jnp.maximum((tokens_of > 0).sum(-1), 1)
        return jnp.where(tokens > 0, 1 + value / self.coefficient, 0)


@dataclass(frozen=True, kw_only=True)
class SelectorEntropy:
    """coefficient · mean_t Σ_j H(r_j) over the tokens t of a sequence, averaged over sequences, r_j being how selector
    j of logits=dselect_k spreads over experts (DSelect-k, arXiv:2106.03760, its entropy regularisation); reported as 1
    plus that mean: 1 where every selector has settled on an expert. It does not even out the load.

    A selector that has settled has no gradient, here as elsewhere."""

    coefficient: float = 1e-6

    needs = frozenset({"selectors"})

    def __post_init__(self):
        if self.coefficient <= 0:
            raise ConfigError(
                "coefficient", f"{self.coefficient} is not positive; for no balance loss choose balance = 'none'"
            )

    @property
    def scope(self) -> LocalScope:
        return "sequence"

    def measure(self, observed: Observed) -> Float[Array, "G S N E"]:
        assert observed.selectors is not None  # they are needed
        return _parts(observed.selectors).sum(-2, keepdims=True)

    def __call__(self, counts, probability_sum, tokens, k, measured):
        return jnp.where(tokens > 0, 1 + measured.sum((-2, -1)) / jnp.maximum(tokens, 1), 0)


def _parts(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """What each probability adds to the entropy, nats."""
    return -p * jnp.log(jnp.maximum(p, 1e-30))
