"""The router: its axes, its one parameter, and the pure function from tokens to a decision."""

import dataclasses
from dataclasses import dataclass
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import choice
from sparsejax.base.reports import MoEReport
from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots, fill_slots, served_tokens
from sparsejax.ops.losses import router_z_sum
from sparsejax.routers.balance import BALANCES, Balance
from sparsejax.routers.scores import SCORES, Score, as_probabilities
from sparsejax.routers.selectors import SELECTORS, Selector
from sparsejax.routers.weights import WEIGHTS, Weight


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One setting of the axes. The default is GShard-like top-2."""

    score: Score = choice(SCORES, "softmax")
    selection: Selector = choice(SELECTORS, "top_k")
    weight: Weight = choice(WEIGHTS, "renormalized")
    balance: Balance = choice(BALANCES, "load_balance")
    z_loss: float = 0.001  # coefficient of the mean of logsumexp(logits)²; 0 is off
    jitter: float = 0.0  # in training the router's input is multiplied by U[1 − jitter, 1 + jitter]

    def __post_init__(self):
        if self.selection.experts_per_token == 1 and self.weight.constant_for_one:
            raise ConfigError(
                "weight",
                "a single expert's renormalized weight is always 1, so the router would get no gradient from the task; "
                "with selection.k=1 use weight=raw",
            )
        if self.z_loss < 0:
            raise ConfigError("z_loss", f"{self.z_loss} is negative; allowed: 0 (off) or more")
        if not 0 <= self.jitter < 1:
            raise ConfigError("jitter", f"{self.jitter} is outside [0, 1)")


@struct
class Decision:
    """Who goes where, with what weight, and what the router looked like doing it."""

    pairs: Pairs
    slots: Slots
    logits_GSE: Float[Array, "G S E"]
    probabilities_GSE: Float[Array, "G S E"]


def decide(
    logits_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], config: RouterConfig, capacities: np.ndarray
) -> Decision:
    """The decision for each group, from float32 logits.

    Args:
      mask_GS: False for padding, which is never selected, takes no slot and buys none.
      capacities: `ops.assignment.capacity_table` of the layer; its last entry is C.
    """
    num_experts = logits_GSE.shape[-1]
    scores_GSE = config.score(logits_GSE)
    pairs = config.selection(scores_GSE, mask_GS)
    limit_G = jnp.asarray(capacities)[mask_GS.sum(-1, dtype=jnp.int32)]
    slots = fill_slots(pairs, num_experts, int(capacities[-1]), limit_G)
    return Decision(
        pairs=dataclasses.replace(pairs, weight=config.weight(pairs, slots.keep)),
        slots=slots,
        logits_GSE=logits_GSE,
        probabilities_GSE=as_probabilities(scores_GSE),
    )


def report(decision: Decision, mask_GS: Bool[Array, "G S"]) -> MoEReport:
    """The decision's sums and counts over these groups; the balance fields are left at 0 for whoever knows the
    units."""
    slots, p_GSE = decision.slots, decision.probabilities_GSE
    dropped_GP = decision.pairs.valid & ~slots.keep
    num_experts = slots.pair.shape[1]
    entropy_GS = -jnp.sum(p_GSE * jnp.log(jnp.maximum(p_GSE, 1e-30)), axis=-1)
    tokens = mask_GS.sum(dtype=jnp.int32)
    return MoEReport(
        assigned=slots.assigned,
        processed=slots.processed,
        dropped_capacity=count_experts(decision.pairs.expert, dropped_GP, num_experts),
        tokens=tokens,
        masked=jnp.int32(mask_GS.size) - tokens,
        unserved=(mask_GS & ~served_tokens(decision.pairs, slots)).sum(dtype=jnp.int32),
        slots=jnp.int32(slots.pair.size),
        probability_sum=jnp.sum(jnp.where(mask_GS[..., None], p_GSE, 0), axis=(0, 1)),
        entropy_sum=jnp.sum(jnp.where(mask_GS, entropy_GS, 0)),
        z_sum=router_z_sum(decision.logits_GSE, mask_GS),
        balance_sum=jnp.float32(0),
        balance_units=jnp.float32(0),
    )


def count_experts(expert: Int[Array, "..."], valid: Bool[Array, "..."], num_experts: int) -> Int[Array, " E"]:
    """How often each expert occurs among the valid entries, exact int32."""
    hits = (expert[..., None] == jnp.arange(num_experts)) & valid[..., None]
    return hits.sum(axis=tuple(range(expert.ndim)), dtype=jnp.int32)


def jitter(x_BTD: Float[Array, "B T D"], keys_B: Optional[Array], amount: float) -> Float[Array, "B T D"]:
    """x ⊙ U[1 − amount, 1 + amount], a row's noise being drawn from its own key: the same on any mesh and any
    accumulation."""
    if keys_B is None or amount == 0:
        return x_BTD
    draw = lambda key, x_TD: jax.random.uniform(key, x_TD.shape, x_TD.dtype, 1 - amount, 1 + amount)  # noqa: E731
    return x_BTD * jax.vmap(draw)(keys_B, x_BTD)
