"""The pure function from tokens to a decision, and what is reported of it."""

import dataclasses
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.reports import Choices, MoEReport
from sparsejax.base.sharding import vary_like
from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots, fill_slots, one_group, served_tokens, sum_over_pairs
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.grouped import common_slots
from sparsejax.ops.losses import router_z_sum
from sparsejax.routers.candidates import Candidates, Inputs
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.exploration import drop_inputs, explore, jitter
from sparsejax.routers.logits import Parameters
from sparsejax.routers.observed import Observed
from sparsejax.routers.projections import project
from sparsejax.routers.replay import replay
from sparsejax.routers.scores import as_probabilities
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.top_k import TopK


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
        logits_GSE = config.logits(seen_GSD, parameters, inputs, num_experts)
        if config.residual and inputs.logits is not None:
            logits_GSE = logits_GSE + project(inputs.logits, parameters["residual"])
        logits_GSE = soft_capped(logits_GSE, config.logit_cap)
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
    explored_GSE = explore(ranking_GSE, inputs.noise, config.exploration)
    if inputs.within is not None:
        explored_GSE = jnp.where(inputs.within, explored_GSE, -jnp.inf)
    dual = config.controller.measure(ranking_GSE, inputs.mask, k)
    pressed_E = None if state is None else config.controller.pressure(state, scores_GSE, inputs.mask)
    candidates = Candidates(
        scores=scores_GSE,
        ranking=config.limit(explored_GSE),
        logits=jax.lax.stop_gradient(noisy_GSE),
        inputs=inputs,
    )
    selection = config.selection
    traits = selection.traits
    if inputs.experts is not None:
        pairs = replay(candidates, inputs.experts, traits)
    elif (traits.train_only and not inputs.training) or (traits.fits and inputs.generating):
        by_score = dataclasses.replace(candidates, ranking=config.limit(jax.lax.stop_gradient(scores_GSE)))
        pairs = TopK(k=k)(by_score)
    else:
        pairs = selection(candidates)
    if inputs.within is not None:  # who wants more experts than there are gets those that there are
        there_GP = pairs.valid & inputs.within[pairs.expert]
        pairs = dataclasses.replace(pairs, valid=there_GP, weight=jnp.where(there_GP, pairs.weight, 0))
    observed = Observed(
        clean=clean_GSE,
        noisy=noisy_GSE,
        spread=spread_GSE,
        probabilities=as_probabilities(scores_GSE, traits.parts),
        score=config.score,
        pairs=pairs,
        inputs=inputs,
        k=k,
        parts=traits.parts,
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
