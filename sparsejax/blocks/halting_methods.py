"""When a token has had enough: adaptive computation time, A-ViT, PonderNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import HaltingReport, Report
from sparsejax.blocks.context import Mode, Totals
from sparsejax.blocks.halting import Chooser, Probability, Terms, TokenHalting
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import param
from sparsejax.ops import budgets
from sparsejax.ops.halting import Halting, by_first_feature, take_ponder_step, take_step


class Score(Chooser):
    """σ(wᵀ x + b), in float32; at first every token has the same."""

    def __init__(self, width: int, bias: float):
        self.weight = param(jnp.zeros(width, jnp.float32), (None,), "router")
        self.bias = param(jnp.asarray(bias, jnp.float32), (), "router")

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Probability:
        return jax.nn.sigmoid(jnp.sum(x_BTD.astype(jnp.float32) * self.weight[...], axis=-1) + self.bias[...])


class FirstFeature(Chooser):
    """`ops.halting.by_first_feature`: no parameters."""

    def __init__(self, scale: float, shift: float):
        self.scale, self.shift = scale, shift

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Probability:
        return by_first_feature(x_BTD, self.scale, self.shift)


def _ponder_cost(reports: Sequence[Report], tokens: Array) -> Float[Array, ""]:
    """Mean of steps + remainder."""
    each = [found.running + found.remainder_sum for found in _found(reports)]
    return sum(each[1:], each[0]) / jnp.maximum(tokens, 1)


def _found(reports: Sequence[Report]) -> list[HaltingReport]:
    return [report.halting for report in reports if report.halting is not None]


@dataclass(frozen=True, kw_only=True)
class AdaptiveComputationTime(TokenHalting):
    """A linear score of the state decides, and the loss has a price for steps + remainder (Graves, arXiv:1603.08983).
    A token that has halted is copied to the layers that follow, which go on attending to it (Universal Transformer,
    arXiv:1807.03819: with `model.tied_repeats`)."""

    bias: float = -1.0  # of the score, at first
    epsilon: float = 0.01  # a token halts where its weights would exceed 1 − ε
    coefficient: float = 0.01  # price of a step

    def __post_init__(self):
        _check_steps(self)

    def chooser(self, backbone: Backbone) -> Score:
        return Score(backbone.d_model, self.bias)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return score_cost(backbone)

    def step(self, state: Halting, probability: Probability, last: Any, mode: Mode) -> tuple[Array, Halting]:
        return take_step(state, probability, last, self.epsilon)

    def losses(self, reports: Sequence[Report], totals: Totals, counted: Optional[Sequence[Report]]) -> Terms:
        return {"ponder": self.coefficient * _ponder_cost(reports, totals.tokens)}


@dataclass(frozen=True, kw_only=True)
class AViT(TokenHalting):
    """The first feature of the state decides, weights are those of adaptive computation time, and no layer attends to a
    token that has halted before it (arXiv:2112.07658). Beside the price of steps there is one for how far the mean
    halting probabilities of the layers, made to add up to 1, are from a normal density about `depth`."""

    scale: float = 5.0
    shift: float = -3.0  # probability: σ(scale · x₀ + shift)
    epsilon: float = 0.01
    coefficient: float = 0.01  # price of a step
    depth: float = 2.0  # layers, of the prior
    deviation: float = 1.0
    prior: float = 0.1  # price of the divergence from it

    visible = False

    def __post_init__(self):
        _check_steps(self)
        if self.deviation <= 0:
            raise ConfigError("deviation", f"{self.deviation} is not positive")
        if self.prior < 0:
            raise ConfigError("prior", f"{self.prior} is negative; allowed: 0 or more")

    def unused(self) -> dict[str, str]:
        return dict.fromkeys(("depth", "deviation"), "prior=0: nothing is compared with them") if not self.prior else {}

    def chooser(self, backbone: Backbone) -> FirstFeature:
        return FirstFeature(self.scale, self.shift)

    def step(self, state: Halting, probability: Probability, last: Any, mode: Mode) -> tuple[Array, Halting]:
        return take_step(state, probability, last, self.epsilon)

    @property
    def counts_first(self) -> bool:
        return self.prior > 0

    def losses(self, reports: Sequence[Report], totals: Totals, counted: Optional[Sequence[Report]]) -> Terms:
        terms = {"ponder": self.coefficient * _ponder_cost(reports, totals.tokens)}
        if not self.prior:
            return terms
        scores = _scores(reports)
        if counted is None:
            return terms | {"halting_prior": self.prior * self.divergence(scores)}
        # Not linear in sums: each microbatch has its part of the value, and of the gradient at the whole step's scores.
        value, slope = jax.value_and_grad(self.divergence)(jax.lax.stop_gradient(_scores(counted)))
        linear = jnp.sum(slope * (scores - jax.lax.stop_gradient(scores)))
        return terms | {"halting_prior": self.prior * (value / totals.microbatches + linear)}

    def divergence(self, scores: Float[Array, " L"]) -> Float[Array, ""]:
        """Of what the layers' halting probabilities are in proportion, nats."""
        p = scores / jnp.maximum(scores.sum(), 1e-9)
        return budgets.kl_to_prior(p, budgets.gaussian_prior(self.depth, self.deviation, len(scores)))


@dataclass(frozen=True, kw_only=True)
class PonderNet(TokenHalting):
    """A linear score of the state gives λ_n, and p_n = λ_n Π_{j < n} (1 − λ_j) is the probability to halt at layer n.
    Training runs all layers and loses Σ_n p_n L_n, L_n being what the head makes of layer n, and the divergence of p
    from a geometric prior (arXiv:2107.05407). Evaluation draws nothing: a token halts where more than the `quantile` of
    its distribution has, and the head reads that state (PALBERT, arXiv:2204.03276)."""

    bias: float = -1.0  # of the score, at first
    rate: float = 0.2  # of the prior: a token would halt after this part of all layers that it begins
    coefficient: float = 0.01  # price of the divergence, KL(p ‖ prior)
    quantile: float = 0.5

    by_step = True

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ConfigError("rate", f"{self.rate} is outside (0, 1)")
        if self.coefficient < 0:
            raise ConfigError("coefficient", f"{self.coefficient} is negative; allowed: 0 or more")
        if not 0 <= self.quantile < 1:
            raise ConfigError("quantile", f"{self.quantile} is outside [0, 1)")

    def chooser(self, backbone: Backbone) -> Score:
        return Score(backbone.d_model, self.bias)

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return score_cost(backbone)

    def step(self, state: Halting, probability: Probability, last: Any, mode: Mode) -> tuple[Array, Halting]:
        return take_ponder_step(state, probability, last, None if mode == "train" else self.quantile)

    def prior_part(self, weight: Probability, layer: Int[Array, ""], num_layers: int, mode: Mode) -> Probability:
        if mode != "train":
            return jnp.zeros_like(weight)
        prior = budgets.geometric_prior(self.rate, num_layers)[layer]
        return budgets.kl_to_prior(weight[..., None], prior[None])

    def losses(self, reports: Sequence[Report], totals: Totals, counted: Optional[Sequence[Report]]) -> Terms:
        each = [found.prior_sum for found in _found(reports)]
        return {"halting_prior": self.coefficient * sum(each[1:], each[0]) / jnp.maximum(totals.tokens, 1)}


def score_cost(backbone: Backbone) -> dict[str, Cost]:
    return {"halting": Cost.of_matrices(backbone.d_model) + Cost(parameters=1, active=1)}


def _scores(reports: Sequence[Report]) -> Float[Array, " L"]:
    """Σ of the halting probabilities of each layer."""
    return jnp.stack([found.probability_sum for found in _found(reports)])


def _check_steps(settings: Any) -> None:
    if not 0 < settings.epsilon < 1:
        raise ConfigError("epsilon", f"{settings.epsilon} is outside (0, 1)")
    if settings.coefficient < 0:
        raise ConfigError("coefficient", f"{settings.coefficient} is negative; allowed: 0 or more")
