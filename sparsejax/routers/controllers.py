"""Axis 3, correction, part two: balance without a loss. A number per expert is added to its ranking, never to its
weight, and moved once per optimizer step by what the step's loads were.

The state is float32 `[N, E]`, its first row being what is added; it has no gradient, evaluation leaves it alone, and
it is moved by int32 counts summed over microbatches and mesh, so neither changes it."""

from dataclasses import dataclass
from typing import Literal, Optional, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry
from sparsejax.base.reports import MoEReport
from sparsejax.routers.annealing import Annealing
from sparsejax.routers.candidates import Selector
from sparsejax.routers.sparsity import Sparsity

State = Float[Array, "*R N E"]


class Controller(Protocol):
    @property
    def rows(self) -> int:
        """N, 0 for no state."""
        ...

    @property
    def thresholds(self) -> bool:
        """Whether 0 in the ranking is where an expert's share of k/E begins."""
        ...

    def temperature(self, state: Float[Array, "N E"]) -> Optional[Float[Array, ""]]:
        """What logits are divided by, None for 1."""
        ...

    def measure(
        self, ranking_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], k: int
    ) -> Optional[tuple[Float[Array, " E"], Float[Array, ""]]]:
        """(sum over groups of what `update` wants to know beside loads, number of groups). The ranking has the
        correction in it."""
        ...

    def check(self, selection: Selector) -> None:
        """Raises `ConfigError` when there is nothing to control in this selection."""
        ...

    def pressure(
        self, state: Float[Array, "N E"], scores_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]
    ) -> Optional[Float[Array, " E"]]:
        """Sum over tokens of the scores times a coefficient of its own: what its loss is made of, with gradient."""
        ...

    def loss(self, report: MoEReport, tokens: Int[Array, ""], k: int) -> Optional[Float[Array, ""]]:
        """What one microbatch adds to the loss of a step with so many tokens, summed over the layers stacked in
        `report`."""
        ...

    def update(self, state: State, report: MoEReport, k: int, free: int = 0) -> State:
        """The state for the next step. `report` is the whole step's; leading axes are repeats of the layer. `free` of
        the experts, the last ones, have no slots that would be short of anything."""
        ...


class WithoutLoss:
    """What controllers that move the ranking alone have in common."""

    def check(self, selection: Selector) -> None:
        pass

    def temperature(self, state) -> None:
        return None

    def pressure(self, state, scores_GSE, mask_GS) -> None:
        return None

    def loss(self, report: MoEReport, tokens, k: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class NoController(WithoutLoss):
    """Nothing is added."""

    rows = 0
    thresholds = False

    def measure(self, ranking_GSE, mask_GS, k):
        return None

    def update(self, state: State, report: MoEReport, k: int, free: int = 0) -> State:
        return state


@dataclass(frozen=True, kw_only=True)
class LossFree(WithoutLoss):
    """Bias towards experts with too little load (Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437).

    With the load error ε_e = 1 − load_e / mean load: `sign` adds rate · sign(ε), `proportional` rate · ε, `momentum`
    rate · v with v ← momentum · v + (1 − momentum) · ε. `soft_clamped` is `momentum` with tanh(sharpness · ε) in place
    of ε, so that no expert, however crowded, is moved by more than the rate (SMEBU, arXiv:2602.17004). The bias keeps
    mean 0, which no selection can see.

    Experts without a network have ε = 0: the others are drawn to their part of all pairs, and how these share the rest
    out is left to the router (LongCat-Flash, arXiv:2509.01322)."""

    rate: float = 0.001
    rule: Literal["sign", "proportional", "momentum", "soft_clamped"] = "sign"
    momentum: float = 0.9
    sharpness: float = 2.0

    thresholds = False

    def __post_init__(self):
        if self.rate <= 0:
            raise ConfigError("rate", f"{self.rate} is not positive")
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", f"{self.momentum} is outside [0, 1)")
        if self.sharpness <= 0:
            raise ConfigError("sharpness", f"{self.sharpness} is not positive")

    def unused(self) -> dict[str, str]:
        readers = {"momentum": ("momentum", "soft_clamped"), "sharpness": ("soft_clamped",)}
        return {
            name: f"rule={self.rule}; it counts with rule={', '.join(rules)}"
            for name, rules in readers.items()
            if self.rule not in rules
        }

    @property
    def rows(self) -> int:
        return 2 if self.rule in ("momentum", "soft_clamped") else 1

    def measure(self, ranking_GSE, mask_GS, k):
        return None

    def update(self, state: State, report: MoEReport, k: int, free: int = 0) -> State:
        num_experts = state.shape[-1]
        balanced = jnp.arange(num_experts) < num_experts - free
        total = report.assigned.sum(-1, keepdims=True)
        error = 1 - num_experts * report.assigned.astype(jnp.float32) / jnp.maximum(total, 1)
        error = jnp.where((total > 0) & balanced, error, 0)
        if self.rule == "sign":
            # In whole numbers, without a product that could overflow.
            mean, rest = total // num_experts, total % num_experts
            below = (report.assigned < mean) | ((report.assigned == mean) & (rest > 0))
            step = jnp.where(balanced, below.astype(jnp.float32) - (report.assigned > mean), 0)
        elif self.rule == "proportional":
            step = error
        else:
            error = jnp.tanh(self.sharpness * error) if self.rule == "soft_clamped" else error
            step = self.momentum * state[..., 1, :] + (1 - self.momentum) * error
        bias = state[..., 0, :] + self.rate * step
        rows = [bias - bias.mean(-1, keepdims=True)] + ([step] if self.rows == 2 else [])
        return jnp.stack(rows, axis=-2)


@dataclass(frozen=True, kw_only=True)
class Quantile(WithoutLoss):
    """Quantile balancing (arXiv:2607.24653): one dual step of the balanced assignment on every batch, for the next.

    For each group of S tokens: α_t is the (k + 1)-th largest corrected score of token t, and β_e the (kS/E + 1)-th
    largest over tokens of score − α. What is added to the ranking is −β, averaged over groups, with mean 0, smoothed
    by `decay`."""

    decay: float = 0.0

    rows = 1
    thresholds = False

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"{self.decay} is outside [0, 1)")

    def measure(self, ranking_GSE, mask_GS, k):
        alpha_GS1 = jax.lax.top_k(ranking_GSE, k + 1)[0][..., k:]
        return _quantiles(ranking_GSE - alpha_GS1, mask_GS, k)

    def update(self, state: State, report: MoEReport, k: int, free: int = 0) -> State:
        assert report.dual_sum is not None and report.dual_units is not None  # `measure` gave them
        quantile = report.dual_sum / jnp.maximum(report.dual_units, 1)[..., None]
        bias = state[..., 0, :] - (1 - self.decay) * quantile
        return (bias - bias.mean(-1, keepdims=True))[..., None, :]


@dataclass(frozen=True, kw_only=True)
class ExpertThreshold(WithoutLoss):
    """Thresholds above which an expert has k/E of the tokens (arXiv:2603.11535). Goes with selection=threshold.

    For each group of S tokens, θ_e is the (kS/E + 1)-th largest score of the expert. What is added to the ranking is
    −θ, averaged over groups, then over steps: a mean of all steps at first, and once there are 1 / (1 − `decay`) of
    them an exponential one. At the first step θ is 0: tokens take the `most`
    experts that they may, and scarce slots drop much. The state's second row is the number of steps."""

    decay: float = 0.99

    rows = 2
    thresholds = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"{self.decay} is outside [0, 1)")

    def measure(self, ranking_GSE, mask_GS, k):
        return _quantiles(ranking_GSE, mask_GS, k)

    def update(self, state: State, report: MoEReport, k: int, free: int = 0) -> State:
        assert report.dual_sum is not None and report.dual_units is not None  # `measure` gave them
        quantile = report.dual_sum / jnp.maximum(report.dual_units, 1)[..., None]  # of scores − θ
        steps = state[..., 1, :] + (report.dual_units > 0).astype(jnp.float32)[..., None]
        part = jnp.maximum(1 - self.decay, 1 / jnp.maximum(steps, 1))
        return jnp.stack([state[..., 0, :] - part * quantile, steps], axis=-2)


def _quantiles(
    values_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], k: int
) -> tuple[Float[Array, " E"], Float[Array, ""]]:
    """(sum over groups of each expert's (kS/E + 1)-th largest of the S unmasked values, number of groups)."""
    tokens_G = mask_GS.sum(-1, dtype=jnp.int32)
    place_G = jnp.minimum(k * tokens_G // values_GSE.shape[-1], jnp.maximum(tokens_G - 1, 0))
    best_first_GSE = jnp.sort(jnp.where(mask_GS[..., None], values_GSE, -jnp.inf), axis=1, descending=True)
    quantile_GE = jnp.take_along_axis(best_first_GSE, place_G[:, None, None], axis=1)[:, 0]
    return jnp.where(tokens_G[:, None] > 0, quantile_GE, 0).sum(0), (tokens_G > 0).sum(dtype=jnp.float32)


CONTROLLERS = Registry(
    "controller",
    {
        "none": NoController,
        "loss_free": LossFree,
        "quantile": Quantile,
        "expert_threshold": ExpertThreshold,
        "sparsity": Sparsity,
        "annealing": Annealing,
    },
)
