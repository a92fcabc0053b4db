"""Balance: the formula over one unit of tokens, and which tokens make a unit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.reports import MoEReport
from sparsejax.ops.assignment import choice_major_pairs
from sparsejax.routers.balance import BALANCES, balance_loss, with_local_balance, with_whole_balance

from support import assert_close, to_numpy

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
