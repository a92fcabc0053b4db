"""Every selector, limit, order and controller against loops, and at the settings where the answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import by_token, choices, fill_slots
from sparsejax.ops.matching import auction, sinkhorn, take_free, token_prices
from sparsejax.routers.balance import LoadBalance, with_whole_balance
from sparsejax.routers.candidates import Noise
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import ExpertThreshold, LossFree, Quantile
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.noise import Gaussian, Gumbel, Learned
from sparsejax.routers.orders import ORDERS, Random
from sparsejax.routers.plans import BalancedAssignment
from sparsejax.routers.router import decide, report, route
from sparsejax.routers.selectors import SELECTORS
from sparsejax.routers.tables import ByDomain, Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert, Threshold, TopK, TopP
from sparsejax.routers.weights import Raw, Renormalized

from reference import selection as slow
from support import assert_close, candidates, known

GROUPS, SIZE, EXPERTS = 3, 10, 8
MASK = np.ones((GROUPS, SIZE), bool)
MASK[1, 6:] = False
MASK[2] = False
RNG = np.random.default_rng(0)
SCORES = RNG.dirichlet(0.4 * np.ones(EXPERTS), (GROUPS, SIZE)).astype(np.float32)
SPARSE = np.where(SCORES > 0.15, SCORES, 0).astype(np.float32)


def noise(seed=0, rows=GROUPS, length=SIZE):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    return Noise(keys_B=keys, row_length=length, groups=(rows, length))


def pairs_of(pairs, g):
    """The valid (token, expert) pairs of a group; no pair twice."""
    valid = np.asarray(pairs.valid[g])
    found = list(
        zip(np.asarray(pairs.token[g])[valid].tolist(), np.asarray(pairs.expert[g])[valid].tolist(), strict=True)
    )
    assert len(set(found)) == len(found), "a pair stands twice"
    return set(found)


def check(pairs, scores, expected):
    """Pairs are those of `expected(g)` among unmasked tokens, weights their scores, and the index finds them all."""
    for g in range(GROUPS):
        assert pairs_of(pairs, g) == {(s, e) for s, e in expected(g) if MASK[g, s]}
        listed = [set(row.tolist()) - {pairs.token.shape[1]} for row in np.asarray(pairs.of_token[g])]
        for p in np.flatnonzero(pairs.valid[g]):
            assert p in listed[int(pairs.token[g, p])]
            np.testing.assert_allclose(pairs.weight[g, p], scores[g, pairs.token[g, p], pairs.expert[g, p]], rtol=1e-6)
    assert {pairs.token.dtype, pairs.expert.dtype, pairs.of_token.dtype} == {jnp.dtype("int32")}


@pytest.mark.parametrize(
    "selector, scores, expected",
    [
        (TopK(k=3), SCORES, lambda g: slow.top_k(SCORES[g], 3)),
        (SecondExpert(policy="all"), SCORES, lambda g: slow.top_k(SCORES[g], 2)),
        (SecondExpert(policy="none"), SCORES, lambda g: slow.top_k(SCORES[g], 1)),
        (
            SecondExpert(policy="threshold", threshold=0.3),
            SCORES,
            lambda g: slow.second_expert(SCORES[g], lambda x: x > 0.3),
        ),
        (TopP(p=0.6, k=4), SCORES, lambda g: slow.top_p(SCORES[g], 0.6, 4)),
        (Positive(k=3, most=3), SPARSE, lambda g: slow.positive(SPARSE[g], 3)),
        (Positive(k=3), SPARSE, lambda g: slow.positive(SPARSE[g], EXPERTS)),
        (Positive(k=3, most=3, above=0.3), SCORES, lambda g: slow.above(SCORES[g], np.full(EXPERTS, 0.3), 3)),
    ],
    ids=lambda value: str(value) if dataclasses.is_dataclass(value) else "",
)
def test_token_choice_against_loops(selector, scores, expected):
    check(jax.jit(lambda s: selector(candidates(s, MASK)))(scores), scores, expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selection_leaves_scores_of_0_out_exactly_when_it_says_so(name):
    nothing = candidates(np.zeros_like(SCORES), MASK, num_slots=4)
    pairs = SELECTORS[name]()(nothing)
    traits = SELECTORS[name]().traits
    assert bool(pairs.valid.any()) != (traits.sparse or traits.thresholds)


class TestPrototypes:
    @pytest.mark.parametrize("k", [1, 2, 8])
    def test_one_of_each_group_with_its_share_of_the_group(self, k):
        pairs = Prototypes(k=k)(candidates(SCORES, MASK))
        share = SCORES / SCORES.reshape(GROUPS, SIZE, k, -1).sum(-1).repeat(EXPERTS // k, axis=-1)
        check(pairs, share, lambda g: slow.prototypes(SCORES[g], k))

    def test_the_balance_is_the_mean_of_those_of_the_groups(self):
        """Each being Switch's of its own experts, E/k Σ f · P, with the softmax over the group."""
        logits = RNG.normal(size=(1, SIZE, EXPERTS)).astype(np.float32)
        config = RouterConfig(selection=Prototypes(k=2), balance=LoadBalance(scope="microbatch"))
        mask = np.ones((1, SIZE), bool)
        decision = decide(jnp.asarray(logits), known(mask, SIZE), config)
        moe = with_whole_balance(report(decision, jnp.asarray(mask)), config.balance, 2)
        wanted = []
        for z in (0, 4):
            p = np.exp(logits[0, :, z : z + 4]) / np.exp(logits[0, :, z : z + 4]).sum(-1, keepdims=True)
            f = np.bincount(p.argmax(-1), minlength=4) / SIZE
            wanted.append(4 * np.sum(f * p.mean(0)))
        np.testing.assert_allclose(float(moe.balance_sum / moe.balance_units), np.mean(wanted), rtol=1e-5)


def test_what_is_not_chosen_has_no_part_in_a_renormalized_weight():
    """Top-p: a token's weights add up to 1. Expert choice: the weights of the real do not depend on padding."""
    for selector, scores in ((TopP(p=0.5, k=4), SCORES), (Positive(k=4), SPARSE)):
        pairs = selector(candidates(scores))
        weight = jnp.where(pairs.valid, Renormalized()(pairs, pairs.valid, 4), 0)
        total = np.asarray(by_token(weight, pairs)).sum(-1)
        served = np.asarray(by_token(pairs.valid, pairs)).any(-1)
        np.testing.assert_allclose(total[served], 1, rtol=1e-5)
    mask = np.arange(2 * SIZE) < SIZE
    padded = np.concatenate([SCORES, SCORES[:, ::-1]], axis=1)
    given = candidates(padded, np.broadcast_to(mask, (GROUPS, 2 * SIZE)), num_slots=6, limit=3)
    found, plain = ExpertChoice()(given), ExpertChoice()(candidates(SCORES, num_slots=3))
    weights = [np.asarray(by_token(Renormalized()(p, p.valid, 2) * p.valid, p))[:, :SIZE] for p in (found, plain)]
    assert_close(weights[0], weights[1], 1e-6)


def test_a_limit_binds_expert_choice():
    limited = GroupLimit(groups=4, kept=1, best=1)(jnp.asarray(SCORES))
    given = dataclasses.replace(candidates(SCORES, num_slots=4), ranking=limited)
    pairs = ExpertChoice()(given)
    for g in range(GROUPS):
        assert all(np.isfinite(limited[g, s, e]) for s, e in pairs_of(pairs, g))


class TestSecondExpert:
    def test_a_random_second_is_taken_in_proportion_to_its_share(self):
        """P(taken) = min(1, g₂ / threshold), at a share of 0.1 and a threshold of 0.2 every other time."""
        scores = np.tile(np.float32([0.9, 0.1, 0.0]), (1, 4000, 1))
        selector = SecondExpert(policy="random", threshold=0.2)
        pairs = selector(candidates(scores, noise=noise(0, 1, 4000)))
        taken = np.asarray(by_token(pairs.valid, pairs))[0]
        assert taken[:, 0].all() and abs(taken[:, 1].mean() - 0.5) < 4 * 0.5 / 4000**0.5

    def test_outside_training_random_is_threshold(self):
        random, threshold = (SecondExpert(policy=policy)(candidates(SCORES)) for policy in ("random", "threshold"))
        assert np.array_equal(random.valid, threshold.valid)

    def test_a_sampled_second_follows_the_scores_of_the_others(self):
        scores = np.tile(np.float32([0.5, 0.1, 0.4]), (1, 4000, 1))
        pairs = SecondExpert(policy="sampling")(candidates(scores, noise=noise(1, 1, 4000)))
        second = np.asarray(by_token(pairs.expert, pairs))[0, :, 1]
        assert set(second) == {1, 2} and abs((second == 2).mean() - 0.8) < 4 * 0.4 / 4000**0.5


class TestExpertChoice:
    def test_against_loops(self):
        limits = [4, 3, 0]
        given = candidates(SCORES, MASK, num_slots=4)
        given = dataclasses.replace(given, inputs=dataclasses.replace(given.inputs, limit=jnp.asarray(limits)))
        pairs = ExpertChoice()(given)
        check(pairs, SCORES, lambda g: slow.expert_choice(SCORES[g], MASK[g], limits[g]))

    def test_every_expert_is_exactly_full_and_nothing_is_dropped(self):
        pairs = ExpertChoice()(candidates(SCORES, num_slots=4))
        slots = fill_slots(pairs, EXPERTS, 4, jnp.full(GROUPS, 4, jnp.int32))
        assert slots.keep.all() and (slots.processed == 4 * GROUPS).all()


class TestCappedExpertChoice:
    CAPPED = ExpertChoice(k=2, cap=2)
    LOGITS = RNG.normal(size=(GROUPS, 32, EXPERTS)) + RNG.normal(size=(GROUPS, 32, 1)) * RNG.normal(size=EXPERTS)
    SCORES = np.asarray(jax.nn.softmax(2 * LOGITS, axis=-1), np.float32)

    def taken(self, selector, scores=None, mask=None, slots=8):
        pairs = selector(candidates(self.SCORES if scores is None else scores, mask, num_slots=slots))
        return [pairs_of(pairs, g) for g in range(GROUPS)]

    def test_prices_against_loops(self):
        for settings in ({"iterations": 40, "temperature": 0.1}, {"iterations": 7, "temperature": 0.05}):
            find = lambda scores, s=settings: token_prices(scores, jnp.ones(32, bool), jnp.int32(5), 2, **s)  # noqa: E731
            _, expected = slow.capped_plan(
                self.SCORES[0].astype(np.float64), 5, 2, settings["temperature"], settings["iterations"]
            )
            assert_close(find(jnp.asarray(self.SCORES[0])), expected.astype(np.float32), 1e-4)
            assert np.ptp(expected) > 0.01

    def test_the_plan_keeps_to_both_sides(self):
        plan, price = slow.capped_plan(self.SCORES[0].astype(np.float64), 8, 2, 0.1, 400)
        np.testing.assert_allclose(plan.sum(0), 8)
        assert plan.sum(1).max() < 2.01 and plan.max() < 1.01
        by_price = np.argsort(price - self.SCORES[0].T, axis=-1)[:, :8]
        assert np.array_equal(np.sort(by_price), np.sort(np.argsort(-plan.T, axis=-1)[:, :8]))

    def test_no_token_has_more_than_the_cap_and_hardly_a_slot_is_empty(self):
        most = lambda pairs: max(np.bincount([s for s, _ in pairs]))  # noqa: E731
        free = self.taken(ExpertChoice(k=2))
        for capped, plain in zip(self.taken(self.CAPPED), free, strict=True):
            assert most(capped) == 2 < most(plain)
            assert len(capped) >= 0.95 * 8 * EXPERTS and max(np.bincount([e for _, e in capped])) <= 8

    def test_its_sum_of_scores_is_near_the_best_there_is(self):
        """Against the linear program, whose best plan is one of whole pairs."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix, eye_array, kron

        by_token = kron(eye_array(32), csr_matrix(np.ones((1, EXPERTS))), format="csr")
        by_expert = kron(csr_matrix(np.ones((1, 32))), eye_array(EXPERTS), format="csr")
        limits = {"A_ub": by_token, "b_ub": np.full(32, 2), "A_eq": by_expert, "b_eq": np.full(EXPERTS, 8)}
        for g, pairs in enumerate(self.taken(self.CAPPED)):
            best = -linprog(-self.SCORES[g].ravel(), **limits, bounds=(0, 1), method="highs-ds").fun
            found = sum(self.SCORES[g, s, e] for s, e in pairs)
            assert 0.97 * best < found <= best + 1e-4

    def test_a_cap_that_nobody_reaches_changes_nothing(self):
        assert self.taken(ExpertChoice(k=2, cap=EXPERTS)) == self.taken(ExpertChoice(k=2))

    def test_padding_and_what_a_limit_excludes_cost_nothing_and_are_not_taken(self):
        mask = np.ones((GROUPS, 32), bool)
        mask[1, 20:], mask[2] = False, False
        given = candidates(self.SCORES, mask, num_slots=5)
        given = dataclasses.replace(given, ranking=GroupLimit(groups=4, kept=2, best=1)(given.ranking))
        found, padded = self.CAPPED(given), np.where(mask[..., None], self.SCORES, 9)
        assert np.isfinite(found.weight).all()
        for g in range(GROUPS):
            assert all(mask[g, s] and np.isfinite(given.ranking[g, s, e]) for s, e in pairs_of(found, g))
        assert self.taken(self.CAPPED, self.SCORES, mask, 5) == self.taken(self.CAPPED, padded, mask, 5)

    def test_wrong_settings(self):
        for field, value in {"cap": 1, "iterations": 0, "temperature": 0.0}.items():
            with pytest.raises(ConfigError) as error:
                ExpertChoice(**({"k": 2, "cap": 2} | {field: value}))
            assert error.value.key == field
        assert set(ExpertChoice().unused()) == {"iterations", "temperature"} and not self.CAPPED.unused()


class TestTables:
    def hashed(self, ids, k=2, seed=42, num_experts=EXPERTS):
        ids = jnp.asarray(ids)
        scores = np.broadcast_to(np.float32(1), (*ids.shape, num_experts))
        pairs = Hash(k=k, seed=seed)(candidates(scores, tokens=ids))
        return np.asarray(by_token(pairs.expert, pairs))

    def test_a_tokens_experts_depend_on_its_id_alone(self):
        ids = RNG.integers(0, 500, (4, 50))
        experts = self.hashed(ids)
        of_id = {int(i): tuple(e) for i, e in zip(ids.ravel(), experts.reshape(-1, 2), strict=True)}
        assert all(of_id[int(i)] == tuple(e) for i, e in zip(ids.ravel(), experts.reshape(-1, 2), strict=True))
        assert np.array_equal(self.hashed(ids[:, ::-1]), experts[:, ::-1])
        assert not np.array_equal(self.hashed(ids, seed=1), experts)

    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_experts_are_distinct_and_equally_likely(self, k):
        experts = self.hashed(np.arange(20_000)[None], k=k)[0]
        assert all(len(set(row)) == k for row in experts[:200].tolist())
        load = np.bincount(experts.ravel(), minlength=EXPERTS)
        share = k / EXPERTS
        assert np.abs(load / 20_000 - share).max() < 5 * (share * (1 - share) / 20_000) ** 0.5

    def test_the_table_is_that_of_whole_numbers(self):
        """A checkpoint's experts belong to the ids they were trained on: the table may never change."""
        ids = [0, 1, 2, 255, 256, 65_535, 2**31 - 1]
        experts = self.hashed(np.array([ids]), k=3)[0].tolist()
        assert experts == [slow.hash_experts(i, EXPERTS, 3, 42) for i in ids]

    def test_a_domain_keeps_its_experts(self):
        domains = jnp.asarray([[0, 1, 7, 8, 9]])
        pairs = ByDomain(k=2)(candidates(np.ones((1, 5, EXPERTS)), domains=domains))
        assert by_token(pairs.expert, pairs)[0].tolist() == [[0, 1], [1, 2], [7, 0], [0, 1], [1, 2]]


class TestGroupLimit:
    @pytest.mark.parametrize("shift", [0.0, -3.0])
    def test_against_loops_also_below_zero(self, shift):
        """All-negative rankings: an excluded group must not win with its 0."""
        ranking = SCORES + np.float32(shift)
        limited = GroupLimit(groups=4, kept=2, best=2)(jnp.asarray(ranking))
        for g in range(GROUPS):
            assert np.array_equal(limited[g], slow.group_limited(ranking[g], 4, 2, 2))
        chosen = np.asarray(jax.lax.top_k(limited, 4)[1])
        assert all(len({e // 2 for e in row}) <= 2 for row in chosen.reshape(-1, 4).tolist())

    def test_all_groups_are_no_limit(self):
        assert np.array_equal(GroupLimit(groups=4, kept=4)(jnp.asarray(SCORES)), SCORES)

    @pytest.mark.parametrize(
        "limit, num_experts, k, key",
        [
            (GroupLimit(groups=3, kept=2), 8, 2, "groups"),
            (GroupLimit(groups=4, kept=1), 8, 3, "kept"),
            (GroupLimit(groups=8, kept=4, best=2), 8, 2, "best"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, limit, num_experts, k, key):
        with pytest.raises(ConfigError) as error:
            limit.check(num_experts, k)
        assert error.value.key == key


class TestOrders:
    @pytest.mark.parametrize("name", [name for name in ORDERS if name != "random"])
    def test_against_loops(self, name):
        given = candidates(SCORES, MASK)
        pairs = ORDERS[name]()(TopK(k=3)(given), given)
        choice = choices(pairs)
        for g in range(GROUPS):
            triples = [(s, c, e) for s, row in enumerate(slow.best(SCORES[g], 3)) for c, e in enumerate(row)]
            expected = slow.order(triples, name, SCORES[g])
            assert (
                list(zip(pairs.token[g].tolist(), choice[g].tolist(), pairs.expert[g].tolist(), strict=True))
                == expected
            )

    @pytest.mark.parametrize("name", ORDERS)
    def test_no_pair_is_lost_and_the_index_follows(self, name):
        given = candidates(SCORES, MASK, noise=noise())
        before = TopK(k=3)(given)
        after = ORDERS[name]()(before, given)
        assert np.array_equal(by_token(after.expert, after), by_token(before.expert, before))
        assert np.array_equal(by_token(after.weight, after), by_token(before.weight, before))
        assert np.array_equal(by_token(after.valid, after), by_token(before.valid, before))

    def test_random_order_is_fair_to_late_tokens(self):
        scores = np.tile(np.float32([1.0, 0.0]), (400, SIZE, 1))
        given = candidates(scores, noise=noise(0, 400, SIZE), num_slots=5)
        pairs = Random()(TopK(k=1)(given), given)
        kept = by_token(fill_slots(pairs, 2, 5, given.inputs.limit).keep, pairs)[..., 0].mean(0)
        assert np.abs(np.asarray(kept) - 0.5).max() < 4 * 0.5 / 400**0.5

    def test_priority_keeps_the_best_tokens(self):
        given = candidates(SCORES, num_slots=1)
        pairs = ORDERS["priority"]()(TopK(k=1)(given), given)
        slots = fill_slots(pairs, EXPERTS, 1, given.inputs.limit)
        weight, keep = np.asarray(pairs.weight), np.asarray(slots.keep)
        for g in range(GROUPS):
            for e in range(EXPERTS):
                mine = np.asarray(pairs.expert[g]) == e
                if mine.any():
                    assert weight[g][mine & keep[g]].min() >= weight[g][mine].max()


@dataclasses.dataclass
class Counted:
    """What controllers read of a report."""

    assigned: object
    dual_sum: object = None
    dual_units: object = None


class TestLossFree:
    LOAD = jnp.array([8, 0, 4, 4], jnp.int32)

    def step(self, **settings):
        controller = LossFree(rate=0.01, **settings)
        return controller.update(jnp.zeros((controller.rows, 4)), Counted(self.LOAD), 1)[0]

    def test_sign_moves_each_expert_by_the_rate_against_its_error(self):
        np.testing.assert_allclose(self.step(rule="sign"), [-0.01, 0.01, 0, 0], atol=1e-9)

    def test_proportional_moves_by_the_error(self):
        np.testing.assert_allclose(self.step(rule="proportional"), [-0.01, 0.01, 0, 0], atol=1e-9)

    def test_momentum_gathers_speed(self):
        controller = LossFree(rate=1.0, rule="momentum", momentum=0.5)
        state = jnp.zeros((2, 4))
        for velocity in (0.5, 0.75, 0.875):
            before = state
            state = controller.update(state, Counted(self.LOAD), 1)
            np.testing.assert_allclose(state[0] - before[0], [-velocity, velocity, 0, 0], atol=1e-6)

    def test_a_soft_clamp_against_loops(self):
        settings = {"rate": 0.01, "momentum": 0.7, "sharpness": 3.0}
        controller = LossFree(rule="soft_clamped", **settings)
        state, bias, speed = jnp.zeros((2, 4)), [0.0] * 4, [0.0] * 4
        for load in ([8, 0, 4, 4], [1, 2, 3, 100], [5, 5, 5, 5]):
            state = controller.update(state, Counted(jnp.asarray(load, jnp.int32)), 1)
            bias, speed = slow.soft_clamped_step(bias, speed, load, **settings)
            assert_close(state, np.float32([bias, speed]))

    def test_a_soft_clamp_bounds_the_step_that_a_crowd_would_make_large(self):
        crowd = Counted(jnp.array([10_000, 1, 1, 1, 1, 1, 1, 1], jnp.int32))
        furthest = {}
        for rule in ("momentum", "soft_clamped"):
            controller = LossFree(rate=1.0, rule=rule, momentum=0.0)
            furthest[rule] = np.abs(controller.update(jnp.zeros((2, 8)), crowd, 1)[1]).max()
        assert furthest["soft_clamped"] <= 1 < 6.9 < furthest["momentum"]

    @pytest.mark.parametrize("rule", ["sign", "proportional", "momentum", "soft_clamped"])
    def test_no_tokens_no_move_and_repeats_are_apart(self, rule):
        controller = LossFree(rule=rule)
        state = jnp.zeros((2, controller.rows, 4))
        moved = controller.update(state, Counted(jnp.stack([self.LOAD, 0 * self.LOAD])), 1)
        assert moved.shape == state.shape and (moved[1] == 0).all() and (moved[0, 0] != 0).any()

    def test_settings_of_other_rules_are_unused(self):
        assert set(LossFree().unused()) == {"momentum", "sharpness"}
        assert set(LossFree(rule="momentum").unused()) == {"sharpness"} and not LossFree(rule="soft_clamped").unused()
        with pytest.raises(ConfigError, match="0 is not positive") as error:
            LossFree(rule="soft_clamped", sharpness=0)
        assert error.value.key == "sharpness"

    def test_counts_of_a_very_long_step_do_not_overflow(self):
        load = np.full(256, 1_000_000)
        load[3] = 10_000_000
        state = LossFree(rate=1.0).update(jnp.zeros((1, 256)), Counted(jnp.asarray(load, jnp.int32)), 1)
        assert np.argmin(state[0]) == 3 and np.ptp(np.delete(np.asarray(state[0]), 3)) == 0 and state[0, 3] < -1.9

    def test_counts_above_256_keep_their_sign(self):
        """In bfloat16 257 and 256 are one number (Megatron-LM pull request 7081)."""
        state = LossFree(rate=1.0).update(jnp.zeros((1, 2)), Counted(jnp.array([257, 256], jnp.int32)), 1)
        assert state[0].tolist() == [-1.0, 1.0]

    @pytest.mark.parametrize("rule", ["sign", "soft_clamped"])
    def test_static_scores_get_balanced(self, rule):
        """The curve of the method on 512 tokens: its imbalance falls to a small part within 300 steps."""
        rng = np.random.default_rng(0)
        scores = 1 / (1 + np.exp(-(1.5 * rng.normal(size=(512, 16)) + rng.normal(size=16))))
        controller = LossFree(rate=0.001, rule=rule)
        state, violation = jnp.zeros((controller.rows, 16)), []
        for _ in range(300):
            load = np.bincount(np.asarray(jax.lax.top_k(scores + np.asarray(state[0]), 2)[1]).ravel(), minlength=16)
            violation.append(load.max() / load.mean() - 1)
            state = controller.update(state, Counted(jnp.asarray(load, jnp.int32)), 2)
        assert violation[0] > 1 and violation[-1] < 0.15 * violation[0]


class TestQuantile:
    def measured(self, scores, bias, k, mask=None):
        mask = np.ones(scores.shape[:2], bool) if mask is None else mask
        total, units = Quantile().measure(jnp.asarray(scores + bias), jnp.asarray(mask), k)
        report = Counted(assigned=None, dual_sum=total, dual_units=units)
        return np.asarray(Quantile().update(jnp.asarray(bias)[None], report, k))[0]

    def test_one_step_against_loops(self):
        bias = np.float32(0.05 * RNG.normal(size=EXPERTS))
        scores = RNG.random((1, 40, EXPERTS)).astype(np.float32)
        assert_close(self.measured(scores, bias, 2), slow.quantile_step(bias, scores[0], 2).astype(np.float32))

    def test_the_column_step_leaves_every_expert_its_share(self):
        """With the new bias exactly k·S/E tokens lie above each expert's quantile, α being that of the old one."""
        scores = RNG.random((1, 64, EXPERTS)).astype(np.float32)
        alpha = np.sort(scores[0], axis=-1)[:, ::-1][:, 2:3]
        total, _ = Quantile().measure(jnp.asarray(scores), jnp.ones((1, 64), bool), 2)
        margin, share = scores[0] - alpha, 2 * 64 // EXPERTS
        assert ((margin > np.asarray(total)).sum(0) <= share).all()  # fewer where margins tie: one of a token's is 0
        assert ((margin >= np.asarray(total)).sum(0) > share).all()
        untied = np.asarray(total) != 0
        assert untied.any() and ((margin > np.asarray(total)).sum(0)[untied] == share).all()

    def test_groups_are_averaged_and_padding_is_not_there(self):
        scores = RNG.random((2, 24, EXPERTS)).astype(np.float32)
        mask = np.ones((2, 24), bool)
        mask[1, 16:] = False
        zero = np.zeros(EXPERTS, np.float32)
        parts = [slow.quantile_step(zero, part, 2) for part in (scores[0], scores[1, :16])]
        assert_close(self.measured(scores, zero, 2, mask), np.mean(parts, axis=0).astype(np.float32))
        empty = np.concatenate([mask, np.zeros((1, 24), bool)])
        more = np.concatenate([scores, scores[:1]])
        assert_close(self.measured(more, zero, 2, empty), self.measured(scores, zero, 2, mask), 1e-6)

    def test_a_stream_of_batches_gets_balanced(self):
        rng, offset = np.random.default_rng(0), 1.5 * np.random.default_rng(1).normal(size=16)
        bias, violation = np.zeros(16, np.float32), []
        for _ in range(12):
            scores = (1 / (1 + np.exp(-(1.5 * rng.normal(size=(1, 512, 16)) + offset)))).astype(np.float32)
            load = np.bincount(np.argsort(-(scores + bias)[0], axis=-1)[:, :2].ravel(), minlength=16)
            violation.append(load.max() / load.mean() - 1)
            bias = self.measured(scores, bias, 2)
        assert violation[0] > 1 and np.mean(violation[2:]) < 0.45


class TestExpertThreshold:
    """Selector and controller: what is above a running quantile."""

    def step(self, scores, state, controller, mask=None, k=2):
        """The controller's state `[2, E]` after one batch `[G, S, E]`."""
        mask = np.ones(scores.shape[:2], bool) if mask is None else mask
        total, units = controller.measure(jnp.asarray(scores + state[0]), jnp.asarray(mask), k)
        report = Counted(assigned=None, dual_sum=total, dual_units=units)
        return np.asarray(controller.update(jnp.asarray(state), report, k))

    def taken(self, scores, state, **fields):
        given = candidates(scores)
        given = dataclasses.replace(given, ranking=jnp.asarray(scores + state[0]))
        return Threshold(**fields)(given)

    def test_after_one_batch_every_expert_has_its_share_of_it(self):
        """Whatever the decay: the first quantile counts whole."""
        scores = RNG.random((1, 64, EXPERTS)).astype(np.float32)
        state = self.step(scores, np.zeros((2, EXPERTS), np.float32), ExpertThreshold())
        pairs = self.taken(scores, state, k=2)
        load = np.bincount(np.asarray(pairs.expert)[np.asarray(pairs.valid)], minlength=EXPERTS)
        assert (load == 2 * 64 // EXPERTS).all()
        assert pairs_of(pairs, 0) == slow.above(scores[0], -state[0], 8)
        assert len({len([p for p in pairs_of(pairs, 0) if p[0] == s]) for s in range(64)}) > 2, "k varies"

    def test_thresholds_are_means_of_quantiles_over_groups_then_steps(self):
        controller = ExpertThreshold(decay=0.6)
        batches = RNG.random((5, 2, 24, EXPERTS)).astype(np.float32)
        mask = np.ones((2, 24), bool)
        mask[1, 16:] = False
        state, theta = np.zeros((2, EXPERTS), np.float32), np.zeros(EXPERTS)
        for n, batch in enumerate(batches):
            state = self.step(batch, state, controller, mask)
            quantile = np.mean([slow.upper_quantile(batch[0], 2), slow.upper_quantile(batch[1, :16], 2)], axis=0)
            part = max(0.4, 1 / (n + 1))
            theta = (1 - part) * theta + part * quantile
            assert_close(state, np.stack([-theta, np.full(EXPERTS, n + 1)]).astype(np.float32))

    def test_a_step_without_tokens_changes_nothing(self):
        state = np.stack([-RNG.random(EXPERTS), np.full(EXPERTS, 3.0)]).astype(np.float32)
        assert np.array_equal(self.step(SCORES, state, ExpertThreshold(), np.zeros_like(MASK)), state)

    def test_most_is_the_most_and_none_is_allowed(self):
        state = np.float32([np.full(EXPERTS, -0.05), np.ones(EXPERTS)])
        pairs = self.taken(SCORES, state, k=1, most=2)
        assert all(pairs_of(pairs, g) == slow.above(SCORES[g], np.full(EXPERTS, 0.05), 2) for g in range(GROUPS))
        assert not np.asarray(self.taken(SCORES, state - 1).valid).any()

    def test_neither_goes_without_the_other(self):
        for settings in ({"selection": Threshold()}, {"controller": ExpertThreshold()}):
            with pytest.raises(ConfigError, match="neither goes without the other") as error:
                RouterConfig(**settings)
            assert error.value.key == "controller"
        with pytest.raises(ConfigError, match="1 is less than k=2"):
            Threshold(most=1)

    def test_a_limit_would_keep_tokens_from_experts_that_have_room_for_them(self):
        with pytest.raises(ConfigError, match=r"expert_threshold goes by all experts.*allowed: limit=none") as error:
            RouterConfig(selection=Threshold(), controller=ExpertThreshold(), limit=GroupLimit())
        assert error.value.key == "controller"


class TestSinkhorn:
    LOGITS = RNG.normal(size=(64, EXPERTS)).astype(np.float32) * 2 + RNG.normal(size=EXPERTS).astype(np.float32)

    def plan(self, logits, mask=None, iterations=8, temperature=1.0):
        mask = jnp.ones(logits.shape[0], bool) if mask is None else jnp.asarray(mask)
        return np.exp(np.asarray(sinkhorn(jnp.asarray(logits), mask, iterations, temperature), np.float64))

    def test_marginals(self):
        plan = self.plan(self.LOGITS, iterations=30)
        np.testing.assert_allclose(plan.sum(0), 64 / EXPERTS, rtol=1e-5)
        np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-3)

    def test_a_shift_of_columns_changes_nothing(self):
        shifted = self.LOGITS + 3 * RNG.normal(size=EXPERTS).astype(np.float32)
        assert_close(self.plan(shifted, iterations=60), self.plan(self.LOGITS, iterations=60), 1e-3)

    def test_extreme_logits_and_padding_are_finite(self):
        mask = np.arange(64) < 40
        plan = self.plan(40 * self.LOGITS, mask)
        assert np.isfinite(plan).all() and (plan[40:] == 0).all()
        np.testing.assert_allclose(plan.sum(0), 40 / EXPERTS, rtol=1e-4)
        assert np.isnan(self.plan(self.LOGITS, np.zeros(64, bool))).sum() == 0

    def test_its_choice_is_more_even_than_the_greedy_one(self):
        violation = lambda best: np.bincount(best, minlength=EXPERTS).max() / (64 / EXPERTS)  # noqa: E731
        greedy, planned = self.LOGITS.argmax(-1), self.plan(self.LOGITS, temperature=0.1, iterations=50).argmax(-1)
        assert violation(planned) < 1.3 < violation(greedy)

    def test_a_low_temperature_comes_near_the_best_assignment(self):
        best = self.LOGITS[scipy_assignment(self.LOGITS)].sum()
        chosen = self.LOGITS[np.arange(64), self.plan(self.LOGITS, temperature=0.03, iterations=300).argmax(-1)].sum()
        assert abs(chosen - best) < 0.05 * abs(best)


def scipy_assignment(scores):
    """Index of the best assignment with S/E tokens an expert: every expert is S/E columns."""
    from scipy.optimize import linear_sum_assignment

    copies = -(-scores.shape[0] // scores.shape[1])
    rows, columns = linear_sum_assignment(np.repeat(scores, copies, axis=1), maximize=True)
    return rows, columns // copies


class TestBalancedAssignment:
    def held(self, scores, epsilon, mask=None, **more):
        size, num_experts = scores.shape
        mask = np.ones(size, bool) if mask is None else mask
        limit = -(-int(mask.sum()) // num_experts)
        run = jax.jit(
            lambda s: auction(s, jnp.asarray(mask), jnp.int32(limit), -(-size // num_experts), epsilon, **more)
        )
        return np.asarray(run(jnp.asarray(scores, jnp.float32)))

    @pytest.mark.parametrize("seed", range(4))
    def test_whole_numbers_give_the_optimum(self, seed):
        scores = np.random.default_rng(seed).integers(0, 20, (40, EXPERTS))
        held = self.held(scores, 1 / 41)
        assert (np.bincount(held, minlength=EXPERTS) == 5).all()
        assert scores[np.arange(40), held].sum() == scores[scipy_assignment(scores)].sum()

    @pytest.mark.parametrize("size", [64, 61])
    def test_others_are_within_the_bound(self, size):
        scores = RNG.normal(size=(size, EXPERTS))
        epsilon = 0.02 * np.ptp(scores)
        held = self.held(scores, epsilon)
        assert np.bincount(held, minlength=EXPERTS).max() <= 8
        best = scores[scipy_assignment(scores)].sum()
        assert best - size * epsilon <= scores[np.arange(size), held].sum() <= best + 1e-4

    def test_padding_takes_part_in_nothing(self):
        scores, mask = RNG.normal(size=(64, EXPERTS)), np.arange(64) < 40
        held = self.held(scores, 0.05, mask)
        assert (held[40:] == EXPERTS).all() and (np.bincount(held[:40], minlength=EXPERTS) == 5).all()
        assert np.array_equal(held[:40], self.held(scores[:40], 0.05))

    def test_what_padding_holds_changes_no_expert(self):
        logits, mask = RNG.normal(size=(1, 64, EXPERTS)), np.arange(64)[None] < 40
        chosen = []
        for scale in (1, 50):
            given = candidates(np.where(mask[..., None], logits, scale * logits), mask)
            pairs = BalancedAssignment()(given)
            chosen.append(np.asarray(by_token(pairs.expert, pairs))[:, :40])
        assert np.array_equal(*chosen)

    @pytest.mark.parametrize("offset, scale", [(0, 1), (30, 1e-5), (-3, 0), (0, 1e-12)])
    def test_every_token_has_an_expert_whatever_the_logits_range(self, offset, scale):
        logits = offset + scale * np.random.default_rng(0).normal(size=(1, 64, EXPERTS))
        pairs = BalancedAssignment()(candidates(logits))
        assert np.asarray(pairs.valid).all() and (np.bincount(pairs.expert[0], minlength=EXPERTS) == 8).all()

    def test_whom_the_rounds_leave_without_a_slot_takes_a_free_one(self):
        """Tokens that are all alike bid for the same expert, round after round."""
        scores, mask = np.repeat(RNG.normal(size=(1, EXPERTS)), 61, axis=0), np.arange(61) % 7 > 0
        held = self.held(scores, 0.001, mask, max_rounds=3)
        assert (held[~mask] == EXPERTS).all() and np.bincount(held[mask], minlength=EXPERTS).max() <= 7
        assert (held[mask] < EXPERTS).all()

    def test_a_free_slot_goes_by_score_and_then_by_order(self):
        scores = jnp.asarray([[3, 2, 1], [3, 2, 1], [3, 2, 1], [0, 1, 3], [3, 2, 1], [3, 2, 1]], jnp.float32)
        held, mask = jnp.array([3, 0, 3, 3, 3, 3]), jnp.array([1, 1, 1, 1, 1, 0], bool)
        assert take_free(scores, held, mask, jnp.int32(2)).tolist() == [0, 0, 1, 2, 1, 3]
        assert take_free(scores, held, mask, jnp.int32(1)).tolist() == [1, 0, 3, 2, 3, 3]

    def test_every_expert_gets_its_share_and_evaluation_the_best(self):
        logits = RNG.normal(size=(2, 32, EXPERTS)).astype(np.float32) + 2 * np.eye(EXPERTS, dtype=np.float32)[0]
        config = RouterConfig(selection=BalancedAssignment(), weight=Raw(), allow_leak=True)
        for training in (True, False):
            inputs = known(np.ones((2, 32), bool), 32, training=training)
            assigned = np.asarray(decide(jnp.asarray(logits), inputs, config).slots.assigned)
            greedy = np.bincount(logits.argmax(-1).ravel(), minlength=EXPERTS)
            assert np.array_equal(assigned, np.full(EXPERTS, 8) if training else greedy)


class TestNoise:
    def drawn(self, kind):
        x = jnp.zeros((400, SIZE, 1))
        return np.asarray(kind.spread(x, {}, 4) * kind.draw(noise(0, 400, SIZE), 4))

    def test_gaussian_has_the_deviation_one_over_e(self):
        values = self.drawn(Gaussian())
        assert abs(values.std() - 0.25) < 0.01 and abs(values.mean()) < 0.01

    def test_gumbel_top_1_draws_from_the_softmax(self):
        logits = np.broadcast_to(np.log(np.float32([0.4, 0.3, 0.2, 0.1])), (400, SIZE, 4))
        chosen = np.asarray(logits + self.drawn(Gumbel())).argmax(-1).ravel()
        share = np.bincount(chosen, minlength=4) / chosen.size
        assert np.abs(share - [0.4, 0.3, 0.2, 0.1]).max() < 4 * 0.5 / chosen.size**0.5

    def test_a_learned_spread_is_that_of_the_equations_and_has_a_gradient(self):
        entry, rng = Learned(), np.random.default_rng(0)
        x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 4, 3), (3, 5)))
        (parameter,) = entry.init(jax.random.key(0), 3, 5).values()
        assert entry.size(3, 5) == (15, 15) and (parameter[...] == 0).all()  # at first the noise is the same for all
        expected = np.log1p(np.exp(np.asarray(x, np.float64) @ np.asarray(weight, np.float64))) + 0.01
        assert_close(entry.spread(x, {"noise": weight}, 5), expected.astype(np.float32), 1e-6)
        draw = entry.draw(noise(0, 1, 4), 5)
        assert np.array_equal(draw, Gaussian().draw(noise(0, 1, 4), 5))
        grad = jax.grad(lambda w: (entry.spread(x, {"noise": w}, 5) * draw)[0, 0, 0])(weight)
        assert np.abs(grad).max() > 0

    def test_noise_is_for_training_and_its_parameters_lie_beside_those_of_the_logits(self):
        config = RouterConfig(noise=Learned(), selection=TopK(k=1), weight=Raw())
        parameters = {name: p[...] for name, p in config.init(jax.random.key(0), 3, 5).items()}
        assert set(parameters) == {"weight", "noise"} and config.size(3, 5) == (30, 30)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, SIZE, 3)), jnp.float32)
        training = known(np.ones((1, SIZE), bool), SIZE, noise=noise(0, 1, SIZE))
        noisy = route(x, parameters, training, config, 5)
        clean = route(x, parameters, known(np.ones((1, SIZE), bool), SIZE, training=False), config, 5)
        assert np.array_equal(noisy.logits_GSE, clean.logits_GSE), "the z-loss is of clean logits"
        assert not np.array_equal(noisy.probabilities_GSE, clean.probabilities_GSE)
        assert np.array_equal(clean.pairs.expert[0], np.asarray(x[0] @ parameters["weight"]).argmax(-1))
