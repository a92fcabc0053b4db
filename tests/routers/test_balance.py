"""Balance: the formula over one unit of tokens, and which tokens make a unit."""

import dataclasses
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
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.entropy import SelectorEntropy
from sparsejax.routers.router import decide, report, route
from sparsejax.routers.scores import Relu
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.top_k import Positive, TopK
from sparsejax.routers.weights import Raw

from reference import balance as slow
from reference import logits as slow_logits
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
        counts = {"rows": jnp.int32(3), "microbatches": 2}
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
    "selector_entropy": lambda p, entropy: (entropy * p)[None],
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


class TestExpertGroups:
    """Balance between groups of experts, which may lie on one device each (DeepSeekMoE, DeepSeek-V2)."""

    GROUPS, NUMBER = 3, 6
    LOGITS = RNG.normal(size=(ROWS, LENGTH, NUMBER)).astype(np.float32)

    def value(self, logits, mask=MASK, k=K, **fields):
        """Of one unit."""
        balance = LoadBalance(scope="microbatch", expert_groups=self.GROUPS, **fields)
        decision = decide(jnp.asarray(logits), known(mask, 3), RouterConfig(selection=TopK(k=k), balance=balance))
        return with_whole_balance(report(decision, jnp.asarray(mask)), balance, k).balance_sum

    def told(self):
        """(experts of each token, best first; probabilities)."""
        p = np.asarray(jax.nn.softmax(self.LOGITS, axis=-1), np.float64)[MASK]
        return np.argsort(-p, axis=-1)[:, :K].tolist(), p

    def test_against_a_loop(self):
        chosen, p = self.told()
        assert float(self.value(self.LOGITS)) == pytest.approx(slow.of_groups(chosen, p, K, self.GROUPS), rel=1e-5)
        first = slow.of_groups([experts[:1] for experts in chosen], p, 1, self.GROUPS)
        assert float(self.value(self.LOGITS, count="first")) == pytest.approx(first, rel=1e-5)
        sent = slow.of_communication(chosen, p, self.GROUPS)
        assert float(self.value(self.LOGITS, count="groups")) == pytest.approx(sent, rel=1e-5)

    def test_a_share_is_between_that_of_experts_and_that_of_groups(self):
        chosen, p = self.told()
        experts, groups = (slow.of_groups(chosen, p, K, n) for n in (self.NUMBER, self.GROUPS))
        found = float(self.value(self.LOGITS, group_share=0.3))
        assert found == pytest.approx(0.7 * experts + 0.3 * groups, rel=1e-5) and abs(experts - groups) > 1e-3

    @pytest.mark.parametrize("count", ["all", "groups"])
    def test_how_a_group_shares_its_own_out_does_not_matter(self, count):
        """Of each group's two experts one has all: 1, and nothing presses."""
        best = np.tile(np.repeat(np.arange(0, self.NUMBER, 2), 2), 2)
        logits, mask = 5 * np.eye(self.NUMBER, dtype=np.float32)[best][None], np.ones((1, 12), bool)
        balance = LoadBalance(scope="microbatch", expert_groups=self.GROUPS, count=count)
        config = RouterConfig(selection=TopK(k=1), weight=Raw(), balance=balance)

        def value(logits, balance=balance):
            decision = decide(logits, known(mask, 12), dataclasses.replace(config, balance=balance))
            return with_whole_balance(report(decision, jnp.asarray(mask)), balance, 1).balance_sum

        assert float(value(logits)) == pytest.approx(1, rel=1e-6)
        assert np.abs(jax.grad(value)(jnp.asarray(logits))).max() < 1e-7
        assert value(logits, LoadBalance(scope="microbatch")) > 1.5

    def test_the_gradient_is_that_of_probabilities_alone(self):
        for count in ("all", "groups"):
            grad = np.asarray(jax.grad(lambda x: self.value(x, count=count))(jnp.asarray(self.LOGITS)))
            assert np.isfinite(grad).all() and (grad[~MASK] == 0).all() and (np.abs(grad[MASK]).max(-1) > 0).all()

    @pytest.mark.parametrize(
        ("fields", "line"),
        [
            ({"expert_groups": 1}, "expert_groups: 1: nothing is to be balanced"),
            ({"expert_groups": 2, "group_share": 0.0}, r"group_share: 0.0 is outside \(0, 1\]"),
            ({"count": "groups"}, "count: groups are those of expert_groups, and there are none"),
        ],
    )
    def test_settings_that_are_nothing(self, fields, line):
        with pytest.raises(ConfigError, match=line):
            LoadBalance(**fields)

    @pytest.mark.parametrize(
        ("groups", "more", "line"),
        [
            (3, {}, "router.balance.expert_groups: 3 groups do not divide num_experts=8"),
            (8, {}, "router.balance.expert_groups: 8 groups of num_experts=8 have one each"),
            (2, {"zero_experts": 2}, "router.balance.expert_groups: an expert without a network is in no group"),
        ],
    )
    def test_groups_that_experts_cannot_make(self, groups, more, line):
        with pytest.raises(ConfigError, match=line):
            MoESpec(num_experts=8, router=RouterConfig(balance=LoadBalance(expert_groups=groups)), **more)

    def test_a_share_of_nothing_is_unused(self):
        assert "group_share" in LoadBalance().unused()
        assert "group_share" in LoadBalance(expert_groups=2, count="groups").unused()
        assert "group_share" not in LoadBalance(expert_groups=2).unused()


class TestSelectorEntropy:
    """Of DSelect-k."""

    ENTRY = DSelectK(selectors=3)
    X = RNG.normal(size=(ROWS, LENGTH, 8)).astype(np.float32)

    def value(self, x, scale=20.0, num_experts=6):
        """(of one unit, the parameters). With `scale` = 1 no bit is near settled, with 1e6 all are."""
        config = RouterConfig(
            logits=self.ENTRY, score=Relu(), selection=Positive(k=4), weight=Raw(), balance=SelectorEntropy()
        )
        made = config.init(jax.random.key(0), 8, num_experts)
        parameters = {name: scale * parameter[...] for name, parameter in made.items()}
        decision = route(jnp.asarray(x), parameters, known(MASK, 3), config, num_experts)
        moe = with_whole_balance(report(decision, jnp.asarray(MASK)), config.balance, 4)
        return moe.balance_sum, to_numpy(parameters)

    @pytest.mark.parametrize("num_experts", [6, 8])
    def test_against_the_equations(self, num_experts):
        value, parameters = self.value(self.X, num_experts=num_experts)
        spread = [slow_logits.selectors(x, parameters, num_experts, 1.0) for x in self.X[MASK]]
        assert float(value) == pytest.approx(
            1 + np.mean([sum(map(slow.entropy, of_token)) for of_token in spread]), 1e-5
        )

    def test_it_is_1_where_all_is_settled_and_then_has_no_gradient(self):
        value, grad = jax.value_and_grad(lambda x: self.value(x, 1e6)[0])(jnp.asarray(self.X))
        assert float(value) == 1 and (np.asarray(grad) == 0).all()
        grad = np.asarray(jax.grad(lambda x: self.value(x)[0])(jnp.asarray(self.X)))
        assert np.isfinite(grad).all() and (grad[~MASK] == 0).all() and np.abs(grad[MASK]).max() > 0

    def test_other_logits_have_no_selectors(self):
        with pytest.raises(ConfigError, match="it goes with them"):
            RouterConfig(balance=SelectorEntropy())
        with pytest.raises(ConfigError, match="0 is not positive"):
            SelectorEntropy(coefficient=0)


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
