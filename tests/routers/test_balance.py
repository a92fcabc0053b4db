"""Balance: the formula over one unit of tokens, and which tokens make a unit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MoEReport
from sparsejax.blocks.moe import MoESpec
from sparsejax.ops.assignment import choice_major_pairs
from sparsejax.routers.balance import BALANCES, LoadBalance, balance_loss, with_local_balance, with_whole_balance
from sparsejax.routers.router import RouterConfig, decide, report
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw

from reference import balance as slow
from support import assert_close, known, to_numpy

ROWS, LENGTH, EXPERTS, K = 4, 6, 5, 2
MASK = np.ones((ROWS, LENGTH), bool)
MASK[0, 4:] = False
MASK[3] = False  # a row of padding is no unit
RNG = np.random.default_rng(0)
CHOSEN = RNG.random((ROWS, LENGTH, EXPERTS)).argsort(-1)[..., :K]
P = RNG.dirichlet(np.ones(EXPERTS), (ROWS, LENGTH)).astype(np.float32)


@dataclass(frozen=True)
class Spread:
    """A formula that is nobody's: Σ_e (counts² + measured) · probabilities / tokens."""

    scope: str
    coefficient: float = 0.5

    def __call__(self, counts, probability_sum, tokens, k, measured):
        return ((counts**2 + measured[..., 0, :]) * probability_sum).sum(-1) / (k * jnp.maximum(tokens, 1))


def by_hand(chosen, p, mask):
    """`Spread` of one unit."""
    counts = np.bincount(chosen[mask].ravel(), minlength=EXPERTS)
    return float(((counts**2 + (p**2)[mask].sum(0)) * p[mask].sum(0)).sum() / (K * max(mask.sum(), 1)))


def empty_report(mask=MASK, chosen=CHOSEN, p=P):
    """The sums that a balance of the whole report reads."""
    zeros = {name: jnp.int32(0) for name in ("masked", "unserved", "slots")}
    sums = {name: jnp.float32(0) for name in ("entropy_sum", "z_sum", "balance_sum", "balance_units")}
    counts = jnp.asarray(np.bincount(chosen[mask].ravel(), minlength=EXPERTS), jnp.int32)
    return MoEReport(
        assigned=counts,
        processed=counts,
        dropped_capacity=0 * counts,
        tokens=jnp.int32(mask.sum()),
        probability_sum=jnp.asarray(p[mask].sum(0)),
        balance_measured=jnp.asarray((p**2)[mask].sum(0))[None],
        **zeros,
        **sums,
    )


def local(balance, groups):
    """The balance fields of a device that routes `MASK` in so many groups."""
    grouped = lambda array: jnp.asarray(array).reshape(groups, -1, *array.shape[2:])  # noqa: E731
    pairs = choice_major_pairs(grouped(CHOSEN), jnp.ones_like(grouped(CHOSEN), jnp.float32), grouped(MASK))
    measured = grouped(P**2)[..., None, :]
    moe = with_local_balance(empty_report(), pairs, grouped(P), jnp.asarray(MASK), balance, K, measured)
    return to_numpy((moe.balance_sum, moe.balance_units))


@pytest.mark.parametrize("groups", [1, 2, ROWS, 2 * ROWS], ids="{} groups".format)
def test_a_sequence_is_a_row_however_tokens_are_grouped(groups):
    rows = [by_hand(CHOSEN[b], P[b], MASK[b]) for b in range(ROWS) if MASK[b].any()]
    assert_close(local(Spread("sequence"), groups), (np.float32(sum(rows)), np.float32(3)))


def test_a_device_is_all_its_tokens():
    assert_close(local(Spread("device"), 2), (np.float32(by_hand(CHOSEN, P, MASK)), np.float32(1)))


@pytest.mark.parametrize("scope", ["microbatch", "global"])
def test_wider_units_are_left_for_later(scope):
    assert_close(local(Spread(scope), 2), (np.float32(0), np.float32(0)))


def test_the_whole_is_one_unit_for_every_layer():
    first, second = empty_report(), empty_report(MASK[:2], CHOSEN[:2], P[:2])
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair), first, second)
    moe = with_whole_balance(stacked, Spread("global"), K)
    expected = [by_hand(CHOSEN, P, MASK), by_hand(CHOSEN[:2], P[:2], MASK[:2])]
    assert_close((moe.balance_sum, moe.balance_units), (np.float32(expected), np.ones(2, np.float32)))


class TestLoss:
    """Of a layer whose step has two microbatches: two rows and two rows."""

    HALVES = (slice(0, 2), slice(2, 4))

    def losses(self, scope, measure):
        balance, counted = Spread(scope), empty_report()
        parts = [measure(balance, empty_report(MASK[h], CHOSEN[h], P[h])) for h in self.HALVES]
        counts = {"tokens": jnp.int32(MASK.sum()), "rows": jnp.int32(3), "microbatches": 2}
        return sum(float(balance_loss(part, balance, K, **counts, counted=counted)) for part in parts)

    def test_global_takes_the_loads_of_the_step(self):
        assert self.losses("global", lambda balance, part: part) == pytest.approx(0.5 * by_hand(CHOSEN, P, MASK), 1e-5)

    def test_microbatch_is_the_mean_over_microbatches(self):
        parts = [by_hand(CHOSEN[h], P[h], MASK[h]) for h in self.HALVES]
        found = self.losses("microbatch", lambda balance, part: with_whole_balance(part, balance, K))
        assert found == pytest.approx(0.5 * np.mean(parts), 1e-5)


MEASURED = {
    "importance_load": lambda p, entropy: jnp.stack([p, K * p]),
    "entropy": lambda p, entropy: jnp.stack([p, entropy * p]),
}
"""Sums of what an entry measures, when these are the sums of probabilities and every token has this entropy."""


@pytest.mark.parametrize("name", BALANCES)
def test_every_entry_is_one_at_perfect_balance_and_more_when_skewed(name):
    balance, tokens = BALANCES[name](), 40
    measured = MEASURED.get(name, lambda p, entropy: None)
    p = jnp.full(EXPERTS, tokens / EXPERTS)
    even = balance(jnp.full(EXPERTS, tokens * K // EXPERTS), p, jnp.int32(tokens), K, measured(p, 0.0))
    assert float(even) == pytest.approx(1.0)
    skewed = jnp.array([tokens, tokens, 0, 0, 0])
    assert float(balance(skewed, skewed / K, jnp.int32(tokens), K, measured(skewed / K, np.log(2)))) > 1.5


class TestFreeExperts:
    """Experts without a network count less (MoE++)."""

    LOGITS = RNG.normal(size=(ROWS, LENGTH, EXPERTS)).astype(np.float32)

    def value(self, logits, free=2, mask=MASK, **fields):
        """Of one unit."""
        config = RouterConfig(selection=TopK(k=K), balance=LoadBalance(free_weight=0.5, scope="microbatch", **fields))
        decision = decide(jnp.asarray(logits), known(mask, 3, free=free), config)
        return with_whole_balance(report(decision, jnp.asarray(mask)), config.balance, K).balance_sum

    def test_against_a_loop(self):
        p = np.asarray(jax.nn.softmax(self.LOGITS, axis=-1), np.float64)[MASK]
        chosen = np.argsort(-p, axis=-1)[:, :K].tolist()
        assert float(self.value(self.LOGITS)) == pytest.approx(slow.with_free_experts(chosen, p, K, 2, 0.5), rel=1e-5)
        first = [experts[:1] for experts in chosen]
        expected = slow.with_free_experts(first, p, 1, 2, 0.5)
        assert float(self.value(self.LOGITS, count="first")) == pytest.approx(expected, rel=1e-5)

    def test_without_free_experts_it_is_the_common_one(self):
        decision = decide(jnp.asarray(self.LOGITS), known(MASK, 3), RouterConfig(selection=TopK(k=K)))
        moe = report(decision, jnp.asarray(MASK))
        plain = with_whole_balance(moe, LoadBalance(scope="microbatch"), K).balance_sum
        assert_close(self.value(self.LOGITS, free=0), plain, 1e-6)

    def test_it_is_1_where_they_have_twice_the_load(self):
        """Of eight tokens four experts have one each and two free ones, at half the weight, two each."""
        load = np.array([1, 1, 1, 1, 2, 2])
        logits = np.tile(np.log(load / 8).astype(np.float32), (1, 8, 1))
        balance, mask = LoadBalance(free_weight=0.5, scope="microbatch"), np.ones((1, 8), bool)
        config = RouterConfig(selection=TopK(k=1), weight=Raw(), balance=balance)
        given = known(mask, 8, free=2, experts=jnp.asarray(np.repeat(np.arange(6), load))[None, :, None])
        moe = with_whole_balance(report(decide(jnp.asarray(logits), given, config), jnp.asarray(mask)), balance, 1)
        assert float(moe.balance_sum) == pytest.approx(1, rel=1e-5)

    def test_the_gradient_is_that_of_probabilities_alone(self):
        grad = np.asarray(jax.grad(self.value)(jnp.asarray(self.LOGITS)))
        assert np.isfinite(grad).all() and (grad[~MASK] == 0).all() and (np.abs(grad[MASK]).max(-1) > 0).all()

    def test_a_weight_that_nobody_has_is_refused(self):
        with pytest.raises(ConfigError, match="0 is not positive"):
            LoadBalance(free_weight=0)
        name = "router.balance.free_weight"
        assert name in MoESpec().unused() and name not in MoESpec(zero_experts=1).unused()
