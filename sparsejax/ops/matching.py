"""Matchings of tokens and experts: every expert the same number of tokens, the sum of scores large, and every token one
expert or not too many."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import vary_like


def sinkhorn(
    logits_SE: Float[Array, "S E"], mask_S: Bool[Array, " S"], iterations: int, temperature: float
) -> Float[Array, "S E"]:
    """The entropic transport plan between tokens and experts, in logarithms: columns hold equal shares after the last
    half-step, rows almost. Rows of padding are −∞ (Clark et al., arXiv:2202.01169; Cuturi 2013).

    The largest entry is taken out before exponents are formed, so that any logits are safe."""
    num_experts = logits_SE.shape[-1]
    kernel_SE = jnp.where(mask_S[:, None], logits_SE / temperature, -jnp.inf)
    share = jnp.log(jnp.maximum(mask_S.sum(), 1) / num_experts)

    def half_steps(_, plan_SE):
        rows_S = jax.nn.logsumexp(plan_SE, axis=1, keepdims=True)
        plan_SE = jnp.where(mask_S[:, None], plan_SE - rows_S, -jnp.inf)
        columns_E = jax.nn.logsumexp(plan_SE, axis=0, keepdims=True)
        return jnp.where(mask_S[:, None], plan_SE - columns_E + share, -jnp.inf)

    return jax.lax.fori_loop(0, iterations, half_steps, kernel_SE)


def token_prices(
    scores_SE: Float[Array, "S E"],
    mask_S: Bool[Array, " S"],
    slots: Int[Array, ""],
    cap: int,
    iterations: int,
    temperature: float,
) -> Float[Array, " S"]:
    """What a token costs where every expert takes `slots` tokens and no token more than `cap` experts: of the plan
    A ≤ 1 that maximises Σ A · score + temperature · entropy under both, the multipliers of the second. An expert's best
    tokens by score − price are those with most of it in the plan (Zhou et al., arXiv:2202.09368, capped expert choice).

    Dykstra's alternating projections, in logarithms. Experts take less where not so many places exist."""
    num_experts = scores_SE.shape[-1]
    kernel_SE = jnp.where(mask_S[:, None], scores_SE / temperature, -jnp.inf)
    share = jnp.log(jnp.minimum(slots, cap * mask_S.sum() / num_experts))

    def sweep(_, state):
        plan_SE, over_SE, price_S = state
        plan_SE = plan_SE + over_SE
        over_SE, plan_SE = jnp.maximum(plan_SE, 0), jnp.minimum(plan_SE, 0)
        plan_SE = plan_SE + price_S[:, None]
        price_S = jnp.maximum(jax.nn.logsumexp(plan_SE, axis=1) - jnp.log(cap), 0)
        plan_SE = plan_SE - price_S[:, None]
        columns_E = jax.nn.logsumexp(plan_SE, axis=0)
        return jnp.where(jnp.isneginf(plan_SE), -jnp.inf, plan_SE - columns_E + share), over_SE, price_S

    zeros = (vary_like(jnp.zeros(shape), scores_SE) for shape in (scores_SE.shape, scores_SE.shape[:1]))
    _, _, price_S = jax.lax.fori_loop(0, iterations, sweep, (kernel_SE, *zeros))
    return temperature * price_S


def auction(
    scores_SE: Float[Array, "S E"],
    mask_S: Bool[Array, " S"],
    limit: Int[Array, ""],
    num_slots: int,
    epsilon: float,
    max_rounds: int = 10_000,
) -> Int[Array, " S"]:
    """Each unmasked token's expert, at most `limit` (≤ `num_slots`) tokens an expert; E for padding.

    Bertsekas' auction with `limit` copies of every expert: all tokens without a slot bid for the expert whose score
    less its price is best, and outbid the next best by ε; an expert keeps the `limit` highest bids. The sum of scores
    is within S · ε of the optimum, so for whole numbers and ε < 1/S it is the optimum. Needs E · limit ≥ unmasked
    tokens, and scores of no more than some 10⁶ ε. Who is without a slot after `max_rounds` gets one that is free
    (`take_free`), and the bound does not hold."""
    size, num_experts = scores_SE.shape
    # What an expert's last slot costs; none is sold at first.
    token_S, expert_E = jnp.arange(size), jnp.arange(num_experts)

    def waiting(held_S):
        return mask_S & (held_S == num_experts)

    def go_on(state):
        held_S, _, _, rounds = state
        return waiting(held_S).any() & (rounds < max_rounds)

    def bid_round(state):
        held_S, bid_S, price_E, rounds = state
        values_SE = scores_SE - price_E
        best_S = jnp.argmax(values_SE, axis=-1)
        first_S = values_SE[token_S, best_S]
        others_SE = jnp.where(expert_E == best_S[:, None], -jnp.inf, values_SE)
        second_S = jnp.where(num_experts > 1, others_SE.max(-1), first_S)
        new_S = waiting(held_S)
        bid_S = jnp.where(new_S, price_E[best_S] + first_S - second_S + epsilon, bid_S)
        asked_S = jnp.where(new_S, best_S, held_S)
        bids_ES = jnp.where(asked_S == expert_E[:, None], bid_S, -jnp.inf)
        top_EC, who_EC = jax.lax.top_k(bids_ES, num_slots)
        kept_EC = (jnp.arange(num_slots) < limit) & jnp.isfinite(top_EC)
        held_S = (
            jnp.full(size, num_experts)
            .at[jnp.where(kept_EC, who_EC, size)]
            .set(jnp.broadcast_to(expert_E[:, None], who_EC.shape), mode="drop")
        )
        last_E = jnp.take_along_axis(top_EC, jnp.broadcast_to(limit - 1, (num_experts, 1)), axis=1)[:, 0]
        return held_S, bid_S, jnp.where(jnp.isfinite(last_E), last_E, 0.0), rounds + 1

    start = (jnp.full(size, num_experts), jnp.zeros(size), jnp.zeros(num_experts), jnp.int32(0))
    start = tuple(vary_like(value, scores_SE) for value in start)
    held_S, *_ = jax.lax.while_loop(go_on, bid_round, start)
    return take_free(scores_SE, held_S, mask_S, limit)


def take_free(
    scores_SE: Float[Array, "S E"], held_S: Int[Array, " S"], mask_S: Bool[Array, " S"], limit: Int[Array, ""]
) -> Int[Array, " S"]:
    """`held_S` with an expert for every unmasked token without one (E): the best that has less than `limit`, earlier
    tokens first. Each round fills an expert or is the last."""
    num_experts = scores_SE.shape[-1]
    expert_E = jnp.arange(num_experts)

    def waiting(held_S):
        return mask_S & (held_S == num_experts)

    def go_on(state):
        held_S, rounds = state
        return waiting(held_S).any() & (rounds < num_experts)

    def ask(state):
        held_S, rounds = state
        free_E = limit - (held_S[:, None] == expert_E).sum(0)
        best_S = jnp.argmax(jnp.where(free_E > 0, scores_SE, -jnp.inf), axis=-1)
        asks_SE = waiting(held_S)[:, None] & (best_S[:, None] == expert_E)
        gets_S = (asks_SE & (jnp.cumsum(asks_SE, axis=0) <= free_E)).any(-1)
        return jnp.where(gets_S, best_S, held_S), rounds + 1

    start = tuple(vary_like(value, scores_SE) for value in (held_S, jnp.int32(0)))
    return jax.lax.while_loop(go_on, ask, start)[0]
