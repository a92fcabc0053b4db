"""The axes of a router one by one, and the decision they make together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.assignment import by_token, choice_major_pairs
from sparsejax.ops.capacity import capacity_table
from sparsejax.routers.balance import LoadBalance, NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import ExpertThreshold, Quantile
from sparsejax.routers.router import count_experts, decide, report
from sparsejax.routers.scores import SCORES, Sigmoid, Softmax, as_probabilities
from sparsejax.routers.selectors import SELECTORS, TopK
from sparsejax.routers.weights import Raw, Renormalized

from reference import routing as slow
from support import (
    ONE_DEVICE,
    assert_close,
    candidates,
    host_batch,
    known,
    moe_layer_params,
    moe_layer_runner,
    to_numpy,
)

GROUPS, SIZE, EXPERTS = 2, 10, 6


def random_logits(seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(GROUPS, SIZE, EXPERTS)), jnp.float32)


MASK = np.ones((GROUPS, SIZE), bool)
MASK[1, 7:] = False


class TestScores:
    @pytest.mark.parametrize("name", SCORES)
    def test_against_the_equations(self, name):
        logits = random_logits()
        expected = np.apply_along_axis(slow.score, -1, np.asarray(logits, np.float64), name)
        assert_close(SCORES[name]()(logits), expected.astype(np.float32), 1e-6)

    @pytest.mark.parametrize("name", SCORES)
    def test_extreme_logits_are_finite_in_value_and_gradient(self, name):
        logits = jnp.array([[[80.0, -80.0, 0.0], [-80.0, -80.0, -80.0]]])
        value, grad = jax.value_and_grad(lambda x: as_probabilities(SCORES[name]()(x))[0, :, 0].sum())(logits)
        assert np.isfinite(value) and np.isfinite(grad).all()

    def test_probabilities_are_scores_over_their_sum(self):
        scores = Sigmoid()(random_logits())
        np.testing.assert_allclose(as_probabilities(scores).sum(-1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(as_probabilities(scores) * scores.sum(-1, keepdims=True), scores, rtol=1e-6)


class TestTopK:
    def test_ties_go_to_the_lower_expert(self):
        scores = jnp.array([[[0.2, 0.3, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]])
        pairs = TopK(k=2)(candidates(scores))
        assert by_token(pairs.expert, pairs).tolist() == [[[1, 2], [0, 1]]]

    def test_the_gradient_goes_to_the_scores_of_the_selected(self):
        pairs = TopK(k=2)(candidates(random_logits(), MASK))
        grad = jax.grad(lambda s: TopK(k=2)(candidates(s, MASK)).weight.sum())(random_logits())
        chosen = np.zeros((GROUPS, SIZE, EXPERTS))
        np.put_along_axis(chosen, np.asarray(by_token(pairs.expert, pairs)), 1, axis=-1)
        assert np.array_equal(grad, chosen)

    def test_k_must_be_positive(self):
        for entry in SELECTORS.values():
            if "k" in entry.__dataclass_fields__:
                with pytest.raises(ConfigError, match="0 is not positive"):
                    entry(k=0)


SCORES_GSK = jnp.array([[[0.6, 0.2], [0.5, 0.3], [0.4, 0.4]]])
KEEP_GSK = jnp.array([[[True, True], [True, False], [False, False]]])


def weighed(weight, scores_GSK=SCORES_GSK):
    """`[G, S, K]` weights of three tokens with two pairs each."""
    pairs = choice_major_pairs(jnp.zeros_like(scores_GSK, jnp.int32), scores_GSK, jnp.ones(scores_GSK.shape[:2], bool))
    keep_GP = KEEP_GSK.transpose(0, 2, 1).reshape(1, -1)
    return by_token(weight(pairs, keep_GP, 2), pairs)


class TestWeights:
    def test_raw(self):
        np.testing.assert_allclose(weighed(Raw()), SCORES_GSK)

    def test_before_the_drop_a_lost_expert_takes_its_part_with_it(self):
        weights = weighed(Renormalized(drop="before"))
        np.testing.assert_allclose(weights[0], [[0.75, 0.25], [0.625, 0.375], [0.5, 0.5]], rtol=1e-6)

    def test_after_the_drop_the_survivor_gets_all(self):
        weights = weighed(Renormalized(drop="after"))
        np.testing.assert_allclose(weights[0, :2, 0], [0.75, 1.0], rtol=1e-6)

    def test_a_token_that_lost_everything_has_a_finite_gradient(self):
        grad = jax.grad(lambda s: (weighed(Renormalized(drop="after"), s) * KEEP_GSK).sum())(SCORES_GSK)
        assert np.isfinite(grad).all()

    @pytest.mark.parametrize("drop", ["before", "after"])
    @pytest.mark.parametrize("logit", [0, -22, -40])
    def test_small_scores_add_up_to_the_scale_as_well(self, drop, logit):
        weight = Renormalized(drop=drop, scale=2.5)
        total = lambda s: weighed(weight, Sigmoid()(s))[0, 0].sum()  # noqa: E731
        logits = jnp.full_like(SCORES_GSK, logit)
        np.testing.assert_allclose(total(logits), 2.5, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(total)(logits), 0, atol=1e-6)  # of all alike

    @pytest.mark.parametrize("weight", [Raw, Renormalized])
    def test_scale(self, weight):
        np.testing.assert_allclose(weighed(weight(scale=2.5)), 2.5 * weighed(weight()))

    def test_softmax_then_top_k_then_renormalized_is_top_k_then_softmax(self):
        logits = random_logits()
        scores = Softmax()(logits)
        pairs = TopK(k=2)(candidates(scores, MASK))
        weights = by_token(Renormalized()(pairs, pairs.valid, 2), pairs)
        experts = by_token(pairs.expert, pairs)
        assert_close(weights, jax.nn.softmax(jnp.take_along_axis(logits, experts, -1), axis=-1), 1e-6)


def decided(config, logits, mask=MASK, factor=0.75):
    capacities = capacity_table(SIZE, EXPERTS, config.selection.experts_per_token, factor, "per_choice")
    inputs = known(mask, int(capacities[-1]))
    inputs = dataclasses.replace(inputs, limit=jnp.asarray(capacities[mask.sum(-1)]))
    return to_numpy(jax.jit(lambda x: decide(x, inputs, config))(logits)), capacities


def chosen(decision):
    """`[G, S, K]` experts."""
    return np.asarray(by_token(jnp.asarray(decision.pairs.expert), decision.pairs))


def weights_of(decision):
    """`[G, S, K]` combine weights."""
    return np.asarray(by_token(jnp.asarray(decision.pairs.weight), decision.pairs))


class TestDecision:
    @pytest.mark.parametrize("weight", [Raw(), Renormalized(drop="before"), Renormalized(drop="after")])
    def test_against_the_reference_group_by_group(self, weight):
        config, logits = RouterConfig(weight=weight), random_logits()
        decision, capacities = decided(config, logits)
        for g in range(GROUPS):
            expected = slow.route(
                np.asarray(logits[g]),
                MASK[g],
                k=2,
                kind="softmax",
                weight="raw" if isinstance(weight, Raw) else weight.drop,
                limit=capacities[MASK[g].sum()],
                num_slots=capacities[-1],
            )
            assert np.array_equal(chosen(decision)[g], expected.experts)
            slot = np.where(decision.slots.pair[g] == 2 * SIZE, -1, decision.slots.pair[g])
            assert np.array_equal(slot, expected.slots)
            kept = expected.kept
            assert_close(weights_of(decision)[g][kept], expected.weights[kept].astype(np.float32), 1e-6)

    def test_renaming_experts_renames_the_decision(self):
        config, logits = RouterConfig(), random_logits()
        order = np.random.default_rng(1).permutation(EXPERTS)
        first, second = decided(config, logits)[0], decided(config, logits[..., order])[0]
        assert np.array_equal(order[chosen(second)], chosen(first))
        assert np.array_equal(second.slots.assigned, first.slots.assigned[order])
        assert np.array_equal(second.slots.pair, first.slots.pair[:, order])
        assert_close(weights_of(second), weights_of(first), 1e-6)

    def test_order_of_tokens_does_not_matter_when_nothing_is_dropped(self):
        config, logits, everyone = RouterConfig(), random_logits(), np.ones_like(MASK)
        order = np.random.default_rng(2).permutation(SIZE)
        first, second = (decided(config, x, everyone, factor=10.0)[0] for x in (logits, logits[:, order]))
        assert first.slots.keep.all() and second.slots.keep.all()
        assert np.array_equal(chosen(second), chosen(first)[:, order])
        assert_close(weights_of(second), weights_of(first)[:, order], 1e-6)

    def test_a_report_adds_up(self):
        decision, _ = decided(RouterConfig(), random_logits())
        moe = to_numpy(jax.jit(report)(decision, jnp.asarray(MASK)))
        assert np.array_equal(moe.assigned, moe.processed + moe.dropped) and moe.dropped.sum() > 0
        assert (moe.tokens, moe.masked) == (17, 3)
        np.testing.assert_allclose(moe.probability_sum.sum(), 17, rtol=1e-6)


class TestCounts:
    def test_are_exact_where_bfloat16_is_not(self):
        expert = jnp.asarray(np.repeat([0, 1], [257, 1023]))
        counts = count_experts(expert, jnp.ones(1280, bool), 3)
        assert counts.dtype == jnp.int32 and counts.tolist() == [257, 1023, 0]

    def test_leave_out_what_is_not_valid(self):
        assert count_experts(jnp.array([[0, 1], [1, 1]]), jnp.array([[True, False], [True, True]]), 2).tolist() == [
            1,
            2,
        ]


class TestConfig:
    def test_every_single_choice_with_a_constant_weight_is_refused(self):
        for name in SELECTORS:
            entry = SELECTORS[name]()
            traits = entry.traits
            averaged = traits.sparse or traits.thresholds  # k is a mean: a token may have several
            if traits.fits or averaged or traits.reinforce or name == "second_expert":
                continue
            selection = dataclasses.replace(entry, k=1) if "k" in entry.__dataclass_fields__ else entry
            leak: dict = {"allow_leak": not entry.traits.causal}
            with pytest.raises(ConfigError, match=r"no gradient from the task.*weight=raw"):
                RouterConfig(selection=selection, weight=Renormalized(), **leak)
            assert RouterConfig(selection=selection, weight=Raw(), **leak).selection.experts_per_token == 1

    def test_a_balance_loss_of_nothing_has_a_name_of_its_own(self):
        with pytest.raises(ConfigError, match="balance = 'none'") as error:
            LoadBalance(coefficient=0.0)
        assert error.value.key == "coefficient" and NoBalance().coefficient == 0.0

    def test_a_layer_without_drops_refuses_what_only_drops_and_groups_read(self):
        """And rightly: its numbers do not depend on them."""
        plain = MoESpec(num_experts=4, d_ff=6, dispatch="grouped", shared_experts=0)
        after = dataclasses.replace(plain.router, weight=Renormalized(drop="after"))
        others = {"group_size": {"group_size": 4}, "router.weight.drop": {"router": after}}
        rng, backbone = np.random.default_rng(0), ModelConfig(d_model=8, num_heads=2)
        x, params = rng.normal(size=(4, 8, 8)).astype(np.float32), moe_layer_params(plain, backbone)
        run = lambda spec: moe_layer_runner(spec, backbone, ONE_DEVICE)(params, x, host_batch(4, 8))[0]  # noqa: E731
        for name, fields in others.items():
            assert name in plain.unused() and name not in dataclasses.replace(plain, dispatch="gather").unused()
            assert_close(run(dataclasses.replace(plain, **fields)), run(plain), 1e-6)

    @pytest.mark.parametrize(
        "fields",
        [
            {"selection": SELECTORS["sinkhorn"](), "weight": Raw()},
            {"selection": SELECTORS["expert_choice"](), "weight": Raw()},
            {"controller": Quantile()},
            {"selection": SELECTORS["threshold"](), "controller": ExpertThreshold(), "weight": Raw()},
        ],
        ids=lambda fields: "-".join(type(entry).__name__ for entry in fields.values()),
    )
    def test_choices_and_measures_of_a_group_read_its_size_without_drops_too(self, fields):
        assert "group_size" not in MoESpec(dispatch="grouped", router=RouterConfig(**fields, allow_leak=True)).unused()

    def test_where_slots_are_the_selection_a_weight_knows_no_drop(self):
        router = RouterConfig(selection=SELECTORS["expert_choice"](), allow_leak=True)
        assert "router.weight.drop" in MoESpec(router=router).unused()
