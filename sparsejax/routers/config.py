"""The router's config: one setting of the axes, what goes with what, and the parameters it has."""

from dataclasses import dataclass
from typing import Optional

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from sparsejax.base.errors import ConfigError, leaks
from sparsejax.base.registry import choice
from sparsejax.routers.balance import BALANCES, Balance, LoadBalance
from sparsejax.routers.candidates import Selector
from sparsejax.routers.controllers import CONTROLLERS, Controller, ExpertThreshold, Quantile, WithoutLoss
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.limits import LIMITS, Limit, NoLimit
from sparsejax.routers.logits import LOGITS, Logits
from sparsejax.routers.noise import NOISES, LogitNoise
from sparsejax.routers.orders import ORDERS, Order
from sparsejax.routers.overflow import OVERFLOWS, Overflow
from sparsejax.routers.plans import BalancedAssignment, Sinkhorn
from sparsejax.routers.projections import router_param
from sparsejax.routers.scores import SCORES, Score
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert
from sparsejax.routers.weights import WEIGHTS, Constant, Renormalized, Weight


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One setting of the axes. The default is GShard-like top-2."""

    logits: Logits = choice(LOGITS, "linear")
    noise: LogitNoise = choice(NOISES, "none")
    score: Score = choice(SCORES, "softmax")
    selection: Selector = choice(SELECTORS, "top_k")
    limit: Limit = choice(LIMITS, "none")
    controller: Controller = choice(CONTROLLERS, "none")
    order: Order = choice(ORDERS, "choice_major")
    overflow: Overflow = choice(OVERFLOWS, "drop")
    weight: Weight = choice(WEIGHTS, "renormalized")
    balance: Balance = choice(BALANCES, "load_balance")
    z_loss: float = 0.001  # coefficient of the mean of logsumexp(logits)²; 0 is off
    jitter: float = 0.0  # in training the router's input is multiplied by U[1 − jitter, 1 + jitter]
    input_dropout: float = 0.0  # in training this share of the numbers of the router's input is 0
    exploration: float = 0.0  # in training this share of tokens ranks the experts at random; weights are as ever
    output_masking: float = 0.0  # in training this share of tokens gets nothing from the experts
    logit_cap: Optional[float] = None  # c · tanh(logits / c)
    residual: bool = False  # to the logits those of the router below are added, times a matrix from 0 (MoE++)
    allow_leak: bool = False  # accept a choice of experts (by any axis) that depends on later tokens

    def __post_init__(self):
        k = self.selection.experts_per_token
        traits = self.selection.traits
        ungated = self.weight.constant_for_one and traits.reinforce is None
        only_on_average = traits.sparse or traits.thresholds
        if k == 1 and ungated and self.learned and not (traits.fits or only_on_average):
            raise ConfigError(
                "weight",
                "a single expert's weight is always the same here, so the router would get no gradient from the task; "
                "with selection.k=1 use weight=raw",
            )
        if isinstance(self.weight, Constant) and not (traits.fixed or traits.reinforce):
            others = {name: entry().traits for name, entry in SELECTORS.items()}
            fit = ", ".join(name for name, other in others.items() if other.fixed or other.reinforce)
            raise ConfigError("weight", f"constant gives a learned router no gradient; it goes with selection={fit}")
        if self.selection.traits.thresholds != self.controller.thresholds:
            selections = ", ".join(name for name, entry in SELECTORS.items() if entry().traits.thresholds)
            controllers = ", ".join(name for name, entry in CONTROLLERS.items() if entry.thresholds)
            reason = f"selection={selections} takes what is above the thresholds of controller={controllers}"
            raise ConfigError("controller", f"{reason}; neither goes without the other")
        alone = isinstance(self.selection, SecondExpert) and self.selection.policy == "none"
        if alone and isinstance(self.weight, Renormalized) and self.weight.drop == "after":
            raise ConfigError("weight", "the only expert's share is always 1; with policy=none use weight=raw")
        if isinstance(self.selection, Prototypes) and not isinstance(self.limit, NoLimit):
            raise ConfigError("limit", "prototypes takes an expert of every group; it goes with limit=none")
        if isinstance(self.controller, (Quantile, ExpertThreshold)) and not isinstance(self.limit, NoLimit):
            name = CONTROLLERS.name_of(self.controller)
            raise ConfigError("controller", f"{name} goes by all experts and knows no limit; allowed: limit=none")
        for axis in ("overflow", "controller"):
            try:
                getattr(self, axis).check(self.selection)
            except ConfigError as error:
                raise error.below(axis) from None
        if "normal noise" in self.balance.needs and not self.noise.normal:
            normal = ", ".join(name for name, entry in NOISES.items() if entry.normal)
            raise ConfigError("balance", f"a load by chance needs normal noise; it goes with noise={normal}")
        if "first choices" in self.balance.needs and self.selection.traits.fits:
            raise ConfigError("balance", "experts that take tokens are nobody's first choice; allowed: count=all")
        if "selectors" in self.balance.needs and not isinstance(self.logits, DSelectK):
            raise ConfigError("balance", "selector_entropy is of the selectors of logits=dselect_k; it goes with them")
        if self.residual and not self.learned:
            raise ConfigError("residual", "a fixed selection with constant weights has no logits; allowed: false")
        if self.z_loss < 0:
            raise ConfigError("z_loss", f"{self.z_loss} is negative; allowed: 0 (off) or more")
        for name in ("jitter", "input_dropout", "output_masking"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is outside [0, 1)")
        if not 0 <= self.exploration <= 1:
            raise ConfigError("exploration", f"{self.exploration} is outside [0, 1]")
        if self.logit_cap is not None and self.logit_cap <= 0:
            raise ConfigError("logit_cap", f"{self.logit_cap} is not positive")

    @property
    def learned(self) -> bool:
        """Whether there is a router matrix at all."""
        return not (self.selection.traits.fixed and isinstance(self.weight, Constant))

    @property
    def needs_noise(self) -> bool:
        draws = (self.jitter, self.input_dropout, self.exploration, self.output_masking)
        needs = self.selection.traits.needs | self.order.traits.needs
        return any(draws) or not self.noise.silent or "noise" in needs

    @property
    def looks_ahead(self) -> Optional[str]:
        """The first axis by which a token's experts depend on the tokens after it."""
        axes = ("logits", "selection", "order", "overflow")
        return next((axis for axis in axes if not getattr(self, axis).traits.causal), None)

    def check_causal(self) -> None:
        """Raises `ConfigError` when a causal model must not route so."""
        if self.looks_ahead is not None and not self.allow_leak:
            raise leaks(self.looks_ahead, "a token's experts would depend on the tokens after it")

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        traits, kind = self.selection.traits, SELECTORS.name_of(self.selection)
        move_ranks = ("exploration", *(["controller"] if isinstance(self.controller, WithoutLoss) else []))
        if traits.fixed:
            reasons |= dict.fromkeys(("limit", "balance", *move_ranks), f"selection={kind} chooses without scores")
        if not self.learned:
            without = "a fixed selection with constant weights has no router"
            reasons |= dict.fromkeys(
                ("logits", "noise", "score", "balance", "controller", "z_loss", "jitter", "input_dropout", "logit_cap"),
                without,
            )
        if isinstance(self.selection, (Sinkhorn, BalancedAssignment)):
            reasons |= dict.fromkeys(("limit", *move_ranks), f"selection={kind} balances the logits itself")
        if isinstance(self.selection, ExpertChoice):
            reasons["controller"] = "a number per expert does not change which tokens it ranks highest"
        if self.logits.traits.blind:
            blind = f"logits={LOGITS.name_of(self.logits)} does not look at the router's input"
            reasons = dict.fromkeys(("jitter", "input_dropout"), blind) | reasons
        if traits.reinforce:
            reasons |= dict.fromkeys(move_ranks, "a policy is drawn from, whatever is added to its ranking")
        if isinstance(self.selection, Positive) and self.selection.most is None:
            everyone = f"selection={kind} takes every expert above {self.selection.above:g}, however it ranks"
            reasons |= dict.fromkeys(move_ranks, everyone)
        if traits.fits:
            reasons["order"] = "its pairs fit their slots in any order"
        if self.looks_ahead is None:
            reasons["allow_leak"] = "logits, selection, order and overflow are accepted without it"
        return reasons

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        """The router's parameters by name; none when it is not learned."""
        if not self.learned:
            return {}
        reinforce = self.selection.traits.reinforce
        noise = self.noise.init(jax.random.fold_in(key, 1), d_model, num_experts)
        own = self.logits.init(key, d_model, num_experts) | noise | (reinforce.init(d_model) if reinforce else {})
        square = num_experts, num_experts
        return own | ({"residual": router_param(key, square, 0.0, None)} if self.residual else {})

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        if not self.learned:
            return 0, 0
        parts = [entry.size(d_model, num_experts) for entry in (self.logits, self.noise)]
        if self.selection.traits.reinforce:
            parts.append(self.selection.traits.reinforce.size(d_model))
        if self.residual:
            parts.append((num_experts**2, num_experts**2))
        return sum(size for size, _ in parts), sum(products for _, products in parts)

    def check(self, num_experts: int) -> None:
        """Raises `ConfigError` when the axes do not go with this number of experts."""
        k = self.selection.experts_per_token
        if k > num_experts:
            raise ConfigError("selection.k", f"{k} experts per token, but there are only num_experts={num_experts}")
        if isinstance(self.selection, Prototypes) and num_experts % k:
            raise ConfigError("selection.k", f"{k} groups do not divide num_experts={num_experts}")
        if isinstance(self.controller, Quantile) and k == num_experts:
            raise ConfigError("controller", f"quantile needs an expert that is not chosen, and k = {k} chooses all")
        if isinstance(self.selection, Hash):
            try:
                self.selection.check(num_experts)
            except ConfigError as error:
                raise error.below("selection") from None
        if isinstance(self.balance, LoadBalance):
            try:
                self.balance.check(num_experts)
            except ConfigError as error:
                raise error.below("balance") from None
        try:
            self.limit.check(num_experts, k)
        except ConfigError as error:
            raise error.below("limit") from None
