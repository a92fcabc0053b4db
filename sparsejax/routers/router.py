"""The router: its axes, its parameters, and the pure function from tokens to a decision."""

import dataclasses
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.base.reports import Choices, MoEReport
from sparsejax.base.sharding import vary_like
from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots, fill_slots, one_group, served_tokens, sum_over_pairs
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.grouped import common_slots
from sparsejax.ops.losses import router_z_sum
from sparsejax.routers.balance import BALANCES, Balance, LoadBalance
from sparsejax.routers.candidates import Candidates, Inputs, Selector
from sparsejax.routers.controllers import CONTROLLERS, Controller, ExpertThreshold, Quantile, WithoutLoss
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.exploration import drop_inputs, explore, jitter
from sparsejax.routers.limits import LIMITS, Limit, NoLimit
from sparsejax.routers.logits import LOGITS, Logits, Parameters
from sparsejax.routers.noise import NOISES, LogitNoise
from sparsejax.routers.observed import Observed
from sparsejax.routers.orders import ORDERS, Order
from sparsejax.routers.overflow import OVERFLOWS, Overflow
from sparsejax.routers.plans import BalancedAssignment, Sinkhorn
from sparsejax.routers.policy import policy
from sparsejax.routers.replay import replay
from sparsejax.routers.scores import SCORES, Score, as_probabilities
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert, TopK
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
        for axis in ("logits", "selection", "order", "overflow"):
            if not getattr(self, axis).traits.causal and not self.allow_leak:
                raise ConfigError(
                    axis,
                    "a token's experts would depend on the tokens after it, which a language model must not see; "
                    "allow_leak=true accepts that",
                )
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
        if all(axis.traits.causal for axis in (self.logits, self.selection, self.order, self.overflow)):
            reasons["allow_leak"] = "logits, selection, order and overflow are accepted without it"
        return reasons

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        """The router's parameters by name; none when it is not learned."""
        if not self.learned:
            return {}
        reinforce = self.selection.traits.reinforce
        noise = self.noise.init(jax.random.fold_in(key, 1), d_model, num_experts)
        return self.logits.init(key, d_model, num_experts) | noise | (reinforce.init(d_model) if reinforce else {})

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        if not self.learned:
            return 0, 0
        parts = [entry.size(d_model, num_experts) for entry in (self.logits, self.noise)]
        if self.selection.traits.reinforce:
            parts.append(self.selection.traits.reinforce.size(d_model))
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


@struct
class Decision:
    """Who goes where, with what weight, and what the router looked like doing it."""

    pairs: Pairs  # of one group, G = 1, when dropless
    slots: Slots
    chosen_GP: Int[Array, "G P"]  # the pairs' experts before any was sent on for want of slots
    processed: Bool[Array, "G P"]  # pairs that reach their expert: in a slot, or of an expert that needs none
    logits_GSE: Float[Array, "G S E"]
    probabilities_GSE: Float[Array, "G S E"]
    ranking_GSE: Float[Array, "G S E"]  # scores after corrections
    dual: Optional[tuple[Float[Array, " E"], Float[Array, ""]]]  # what the controller measured
    pressed_E: Optional[Float[Array, " E"]]  # what its loss is made of
    measured_GSNE: Optional[Float[Array, "G S N E"]]  # what the balance measured
    choices: Optional[Choices] = None  # of a policy, `[G, S]`
    lost: Optional[Bool[Array, "G P"]] = None  # pairs that the exchange between devices had no room for

    def without(self, lost_GP: Bool[Array, "G P"]) -> "Decision":
        """The decision after an exchange that lost these pairs."""
        count_E = count_experts(self.pairs.expert, lost_GP, len(self.slots.processed))
        slots = dataclasses.replace(self.slots, processed=self.slots.processed - count_E)
        return dataclasses.replace(self, slots=slots, processed=self.processed & ~lost_GP, lost=lost_GP)


def route(
    x_GSD: Float[Array, "G S D"],
    parameters: Parameters,
    inputs: Inputs,
    config: RouterConfig,
    num_experts: int,
    state: Optional[Float[Array, "N E"]] = None,
) -> "Decision":
    """The decision for each group of tokens, in float32 whatever the dtype of `x_GSD`."""
    spread_GSE, selectors_GSNE = None, None
    if config.learned:
        seen_GSD = jitter(x_GSD.astype(jnp.float32), inputs.noise, config.jitter)
        seen_GSD = drop_inputs(seen_GSD, inputs.noise, config.input_dropout)
        logits_GSE = soft_capped(config.logits(seen_GSD, parameters, inputs, num_experts), config.logit_cap)
        if inputs.noise is not None and not config.noise.silent:
            spread_GSE = config.noise.spread(seen_GSD, parameters, num_experts)
        if "selectors" in config.balance.needs and isinstance(config.logits, DSelectK):
            selectors_GSNE = config.logits.chosen(seen_GSD, parameters, num_experts)  # the logits have it in common
    else:
        logits_GSE = vary_like(jnp.zeros((*x_GSD.shape[:2], num_experts), jnp.float32), x_GSD)
    reinforce = config.selection.traits.reinforce
    baseline_GS = reinforce.expected(x_GSD.astype(jnp.float32), parameters) if reinforce else None
    return decide(logits_GSE, inputs, config, state, spread_GSE, baseline_GS, selectors_GSNE)


def decide(
    logits_GSE: Float[Array, "G S E"],
    inputs: Inputs,
    config: RouterConfig,
    state: Optional[Float[Array, "N E"]] = None,
    spread_GSE: Optional[Float[Array, "G S E"]] = None,
    baseline_GS: Optional[Float[Array, "G S"]] = None,
    selectors_GSNE: Optional[Float[Array, "G S N E"]] = None,
) -> Decision:
    """The decision for each group, from float32 logits. Padding is never selected and takes no slot.

    Args:
      state: of the controller, if it has one.
      spread_GSE: what the noise is multiplied with, if there is any.
      baseline_GS: the rewards that a policy expects, if the selection is one; its pairs are scored with π.
      selectors_GSNE: of the logits, if the balance needs them.
    """
    num_experts, k = logits_GSE.shape[-1], config.selection.experts_per_token
    clean_GSE, temperature = logits_GSE, None if state is None else config.controller.temperature(state)
    if temperature is not None:
        clean_GSE, spread_GSE = jax.tree.map(lambda values_GSE: values_GSE / temperature, (logits_GSE, spread_GSE))
    noisy_GSE = clean_GSE
    if spread_GSE is not None and inputs.noise is not None:
        noisy_GSE = clean_GSE + spread_GSE * config.noise.draw(inputs.noise, num_experts)
    scores_GSE = config.score(noisy_GSE)
    ranking_GSE = jax.lax.stop_gradient(scores_GSE)
    if state is not None:
        ranking_GSE = ranking_GSE + state[0]
    dual = config.controller.measure(ranking_GSE, inputs.mask, k)
    pressed_E = None if state is None else config.controller.pressure(state, scores_GSE, inputs.mask)
    candidates = Candidates(
        scores=scores_GSE,
        ranking=config.limit(explore(ranking_GSE, inputs.noise, config.exploration)),
        logits=jax.lax.stop_gradient(noisy_GSE),
        inputs=inputs,
    )
    selection = config.selection
    traits = selection.traits
    if inputs.experts is not None:
        weighed = dataclasses.replace(candidates, scores=policy(candidates)) if traits.reinforce else candidates
        pairs = replay(weighed, inputs.experts)
    elif (traits.train_only and not inputs.training) or (traits.fits and inputs.generating):
        by_score = dataclasses.replace(candidates, ranking=config.limit(jax.lax.stop_gradient(scores_GSE)))
        pairs = TopK(k=k)(by_score)
    else:
        pairs = selection(candidates)
    observed = Observed(
        clean=clean_GSE,
        noisy=noisy_GSE,
        spread=spread_GSE,
        probabilities=as_probabilities(scores_GSE),
        score=config.score,
        pairs=pairs,
        inputs=inputs,
        k=k,
        selectors=selectors_GSNE,
    )
    choices = None
    if baseline_GS is not None:
        log_pi_GS = jnp.log(jnp.maximum(sum_over_pairs(pairs.weight, pairs), 1e-30))
        choices = Choices(log_probability=log_pi_GS, baseline=baseline_GS)
    if inputs.dropless:
        pairs = one_group(pairs)
        chosen_GP = pairs.expert
        expected = pairs.token.size if traits.fits else k * inputs.mask.size  # the list may be longer than its pairs
        slots = fill_slots(pairs, num_experts - inputs.free, common_slots(expected, num_experts), None)
    else:
        pairs, slots, chosen_GP = config.overflow(config.order(pairs, candidates), candidates)
    processed_GP = slots.keep | (pairs.valid & (pairs.expert >= num_experts - inputs.free))
    return Decision(
        pairs=dataclasses.replace(pairs, weight=config.weight(pairs, processed_GP, k)),
        slots=slots,
        chosen_GP=chosen_GP,
        processed=processed_GP,
        logits_GSE=logits_GSE,
        probabilities_GSE=observed.probabilities,
        ranking_GSE=candidates.ranking,
        dual=dual,
        pressed_E=pressed_E,
        measured_GSNE=config.balance.measure(observed),
        choices=choices,
    )


def report(decision: Decision, mask_GS: Bool[Array, "G S"]) -> MoEReport:
    """The decision's sums and counts over these groups; the balance fields are left at 0 for whoever knows the
    units."""
    pairs, slots, p_GSE = decision.pairs, decision.slots, decision.probabilities_GSE
    num_experts, with_slots = p_GSE.shape[-1], slots.pair.shape[1]
    free_E = count_experts(pairs.expert, pairs.valid, num_experts)[with_slots:]
    served_GS = served_tokens(pairs, decision.processed).reshape(mask_GS.shape)
    entropy_GS = -jnp.sum(p_GSE * jnp.log(jnp.maximum(p_GSE, 1e-30)), axis=-1)
    arrived_GP = decision.processed if decision.lost is None else decision.processed | decision.lost
    tokens = mask_GS.sum(dtype=jnp.int32)
    measured = decision.measured_GSNE
    dual_sum, dual_units = (None, None) if decision.dual is None else decision.dual
    return MoEReport(
        assigned=jnp.concatenate([slots.assigned, free_E]),
        processed=jnp.concatenate([slots.processed, free_E]),
        dropped_capacity=count_experts(decision.chosen_GP, pairs.valid & ~arrived_GP, num_experts),
        tokens=tokens,
        masked=jnp.int32(mask_GS.size) - tokens,
        unserved=(mask_GS & ~served_GS).sum(dtype=jnp.int32),
        slots=jnp.int32(slots.pair.size),
        probability_sum=jnp.sum(jnp.where(mask_GS[..., None], p_GSE, 0), axis=(0, 1)),
        entropy_sum=jnp.sum(jnp.where(mask_GS, entropy_GS, 0)),
        z_sum=router_z_sum(decision.logits_GSE, mask_GS),
        balance_sum=jnp.float32(0),
        balance_units=jnp.float32(0),
        balance_measured=None if measured is None else jnp.where(mask_GS[..., None, None], measured, 0).sum((0, 1)),
        dual_sum=dual_sum,
        dual_units=dual_units,
        pressed_sum=decision.pressed_E,
    )


def count_experts(expert: Int[Array, "..."], valid: Bool[Array, "..."], num_experts: int) -> Int[Array, " E"]:
    """How often each expert occurs among the valid entries, exact int32."""
    hits = (expert[..., None] == jnp.arange(num_experts)) & valid[..., None]
    return hits.sum(axis=tuple(range(expert.ndim)), dtype=jnp.int32)
