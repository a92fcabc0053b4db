"""Halting weights against a loop over steps, their invariants, and their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import budgets, halting

from reference import halting as slow

STEPS, TOKENS = 6, 60
RNG = np.random.default_rng(0)
P = jnp.asarray(RNG.beta(0.7, 1.5, (TOKENS, STEPS)), jnp.float32)
LOGITS = jnp.asarray(RNG.normal(size=(TOKENS, STEPS)), jnp.float32)


class TestAct:
    @pytest.mark.parametrize("epsilon", [0.01, 0.3])
    def test_against_a_loop(self, epsilon):
        weights, state = halting.act(P, epsilon)
        for token in range(TOKENS):
            expected, n, remainder = slow.act([float(p) for p in P[token]], epsilon)
            np.testing.assert_allclose(weights[token], expected, atol=1e-6)
            assert state.steps[token] == n
            np.testing.assert_allclose(state.ponder[token], n + remainder, rtol=1e-6)
        assert len(set(np.asarray(state.steps))) > 3

    def test_weights_add_up_to_1_whatever_the_probabilities(self):
        for p in (P, P * 0, P * 0 + 1, P * 0.05):
            weights, state = halting.act(p)
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
            assert (weights >= 0).all() and (state.spent == 1).all() and state.halted.all()

    def test_at_once_and_never(self):
        at_once, never = (halting.act(jax.nn.sigmoid(jnp.full((3, STEPS), b)))[1] for b in (jnp.inf, -jnp.inf))
        np.testing.assert_array_equal(at_once.steps, 1)
        np.testing.assert_array_equal(at_once.ponder, 2)
        np.testing.assert_array_equal(never.steps, STEPS)
        np.testing.assert_array_equal(never.ponder, STEPS + 1)

    def test_a_halted_token_s_output_is_frozen(self):
        outputs = jnp.asarray(RNG.normal(size=(TOKENS, STEPS)), jnp.float32)
        weights, state = halting.act(P)
        later = jnp.arange(STEPS) >= state.steps[:, None]
        mixed = (weights * outputs).sum(-1)
        np.testing.assert_array_equal((weights * jnp.where(later, 99.0, outputs)).sum(-1), mixed)

    def test_ponder_pulls_every_weight_but_the_last_up(self):
        pull = jax.grad(lambda p: halting.act(p)[1].ponder.sum())(P)
        steps = halting.act(P)[1].steps
        before_last = np.arange(STEPS) < np.asarray(steps)[:, None] - 1
        np.testing.assert_array_equal(pull, np.where(before_last, -1.0, 0.0))

    def test_steps_one_by_one_under_scan_are_the_same(self):
        def step(state, seen):
            p, last = seen
            weight, state = halting.take_step(state, p, last)
            return state, weight

        begin = halting.begin(jnp.ones(TOKENS, bool))
        state, weights = jax.lax.scan(step, begin, (P.T, jnp.arange(STEPS) == STEPS - 1))
        expected, end = halting.act(P)
        np.testing.assert_array_equal(weights.T, expected)
        np.testing.assert_array_equal(state.ponder, end.ponder)

    def test_padding_takes_no_step(self):
        real = jnp.arange(TOKENS) % 3 > 0
        weight, state = halting.take_step(halting.begin(real), P[:, 0], False)
        assert (weight[::3] == 0).all() and (state.steps[::3] == 0).all() and (state.ponder[::3] == 0).all()
        np.testing.assert_array_equal(state.steps[1::3], 1)

    def test_a_feature_of_the_state_is_the_probability(self):
        x = jnp.array([[0.0, 9.0], [2.0, -9.0]])
        np.testing.assert_allclose(halting.by_first_feature(x, 5.0, -10.0), [1 / (1 + np.exp(10)), 0.5], rtol=1e-6)


class TestPonderNet:
    def test_against_a_loop_with_what_is_left_on_the_last_step(self):
        p = halting.ponder_distribution(LOGITS)
        for token in range(TOKENS):
            np.testing.assert_allclose(p[token], slow.ponder_distribution([float(v) for v in LOGITS[token]]), atol=1e-6)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("logit, step", [(np.inf, 0), (-np.inf, STEPS - 1), (80.0, 0), (-80.0, STEPS - 1)])
    def test_at_once_and_never(self, logit, step):
        p = halting.ponder_distribution(jnp.full((1, STEPS), logit))
        np.testing.assert_allclose(p[0], np.eye(STEPS)[step], atol=1e-6)

    def test_its_gradient_is_that_of_drawing_a_halt_at_every_step(self):
        """E of the loss at the step where the first of independent coins falls, by counting all coins."""
        losses = np.array([0.9, -0.4, 1.3, 0.2])
        logits = LOGITS[0, :4]

        def counted(logits):
            on = jax.nn.sigmoid(logits[:3])
            total = jnp.float32(0)
            for coins in itertools.product((0, 1), repeat=3):
                p = jnp.prod(jnp.where(jnp.array(coins) == 1, on, 1 - on))
                total += p * losses[coins.index(1) if 1 in coins else 3]
            return total

        found = jax.grad(lambda t: (halting.ponder_distribution(t) * losses).sum())(logits)
        np.testing.assert_allclose(found, jax.grad(counted)(logits), atol=1e-6)
        assert found[3] == 0

    def test_the_prior_is_the_distribution_of_a_constant_rate(self):
        rate = 0.2
        p = halting.ponder_distribution(jnp.full((1, STEPS), jnp.log(rate / (1 - rate))))
        np.testing.assert_allclose(p[0], budgets.geometric_prior(rate, STEPS), rtol=1e-5)
        np.testing.assert_allclose(budgets.kl_to_prior(p, budgets.geometric_prior(rate, STEPS)), 0, atol=1e-6)
        for logit in (60.0, -60.0):
            extreme = jnp.full((1, STEPS), logit)
            kl = lambda t: budgets.kl_to_prior(halting.ponder_distribution(t), p[0]).sum()  # noqa: E731
            assert np.isfinite(jax.grad(kl)(extreme)).all()

    def test_steps_in_the_mean_and_at_a_quantile(self):
        p = jnp.array([[0.1, 0.2, 0.3, 0.4], [1.0, 0, 0, 0]])
        np.testing.assert_allclose(halting.mean_steps(p), [3.0, 1.0], rtol=1e-6)
        for quantile, expected in ((0.0, [0, 0]), (0.25, [1, 0]), (0.55, [2, 0]), (1.0, [3, 3])):
            np.testing.assert_array_equal(halting.quantile_step(p, quantile), expected)
