"""Balance by importance and load: what experts are given, and how often, should vary little between them."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.base.errors import ConfigError
from sparsejax.ops.losses import smooth_load, squared_variation
from sparsejax.routers.observed import LocalScope, Observed


@dataclass(frozen=True, kw_only=True)
class ImportanceLoad:
    """importance · CV²(Σ_t g_t) + load · CV²(Σ_t P(e is chosen by t)), over the tokens t of one unit, averaged over
    units; reported as 1 plus that over the sum of both coefficients.

    The probability is that of the token's noise being drawn anew for one expert, so that how often an expert is chosen
    has a gradient. `shazeer` (arXiv:1701.06538): g are scores over the sum of the selected, and to be chosen
    is to beat the k-th best of the others. `vmoe` (arXiv:2106.05974): g are probabilities without noise,
    over all experts, and to be chosen is to beat the k-th best of all, oneself among them. Without noise, as in
    evaluation, there is no such probability, and importance is all that is left."""

    form: Literal["shazeer", "vmoe"] = "vmoe"
    importance: float = 0.005
    load: float = 0.005
    scope: LocalScope = "sequence"

    def __post_init__(self):
        for name in ("importance", "load"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"{getattr(self, name)} is negative")
        if self.coefficient == 0:
            raise ConfigError("load", "importance and load are both 0; for no balance loss choose balance = 'none'")

    @property
    def coefficient(self) -> float:
        return self.importance + self.load

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"normal noise"} if self.load else ())

    def measure(self, observed: Observed) -> Float[Array, "G S N E"]:
        paper = self.form == "shazeer"
        rows = [observed.gates() if paper else observed.clean_probabilities()]
        if self.load and observed.spread is not None:
            load = smooth_load(observed.clean, observed.noisy, observed.spread, observed.k, among_others=paper)
            rows.append(load)
        return jnp.stack(rows, axis=-2)

    def __call__(self, counts, probability_sum, tokens, k, measured):
        value = self.importance * squared_variation(measured[..., 0, :])
        if measured.shape[-2] == 2:
            value = value + self.load * squared_variation(measured[..., 1, :])
        return jnp.where(tokens > 0, 1 + value / self.coefficient, 0)
