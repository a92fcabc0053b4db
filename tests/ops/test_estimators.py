"""Gradients of discrete choices against counting all of them, and where estimators are known to be off."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.ops import estimators
from sparsejax.ops.estimators import (
    binary_straight_through,
    gumbel_sigmoid,
    gumbel_softmax,
    gumbel_top_k,
    hard_concrete,
    hard_concrete_on,
    learned_temperature_gate,
    multiplicative_gate,
    one_hot_straight_through,
    straight_through,
    straight_through_top_k,
    top_k_indicator,
)
from sparsejax.ops.gates import GATES
from sparsejax.ops.reinforce import bernoulli_log_probability, leave_one_out, moving_baseline, reinforce_terms

from reference import estimators as slow

DRAWS = 200_000
THETA, KEY = 0.4, jax.random.key(0)


def toy(z):
    return jnp.square(z - 0.45)


def gradients(gate) -> np.ndarray:
    """d f(z) / dθ of so many independent draws at θ = 0.4."""
    return np.asarray(jax.grad(lambda logits: toy(gate(logits)).sum())(jnp.full(DRAWS, THETA)), np.float64)


class TestTheToyOfOneGate:
    """f = (z − 0.45)² at θ = 0.4. Means and deviations of a draw's gradient."""

    def test_the_exact_gradient(self):
        exact = slow.gradient_over_gates(lambda z: (z[0] - 0.45) ** 2, [THETA])
        np.testing.assert_allclose(exact, 0.0240, atol=5e-5)
        step = 1e-5
        ends = [slow.expectation_over_gates(lambda z: (z[0] - 0.45) ** 2, [THETA + s]) for s in (step, -step)]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), exact[0], rtol=1e-6)

    @pytest.mark.parametrize(
        "temperature, hard, mean, deviation",
        [
            (0.1, True, 0.0303, 0.635),
            (0.5, True, 0.0428, 0.274),
            (1, True, 0.0407, 0.179),
            (2, True, 0.0296, 0.107),
            (1, False, 0.0295, 0.068),
        ],
    )
    def test_relaxations_are_as_biased_as_is_known(self, temperature, hard, mean, deviation):
        exact = slow.relaxed_gate(lambda z: 2 * (z - 0.45), THETA, temperature, hard)
        np.testing.assert_allclose(exact, [mean, deviation], atol=6e-4)
        settings = {"temperature": temperature, "hard": hard}
        of_two = lambda t: gumbel_softmax(jnp.stack([t, 0 * t], -1), KEY, **settings)[:, 0]  # noqa: E731
        for gate in (lambda t: gumbel_sigmoid(t, KEY, **settings), of_two):
            found = gradients(gate)
            assert found.mean() == pytest.approx(exact[0], abs=4 * exact[1] / DRAWS**0.5)
            assert found.std() == pytest.approx(exact[1], rel=0.02)

    def test_the_straight_through_gradient_is_three_times_too_large(self):
        found = gradients(lambda t: binary_straight_through(t, KEY))
        assert found.mean() == pytest.approx(0.072, abs=0.0025)

    @pytest.mark.parametrize("baseline, deviation", [(0.0, 0.119), ("mean", 0.010)])
    def test_reinforce_is_unbiased_and_a_baseline_takes_its_noise(self, baseline, deviation):
        p = 1 / (1 + np.exp(-THETA))
        level = p * 0.55**2 + (1 - p) * 0.45**2 if baseline == "mean" else baseline
        z = binary_straight_through(jnp.full(DRAWS, THETA), KEY)

        def surrogate(logits):
            return reinforce_terms(bernoulli_log_probability(logits, z), -level, -toy(z))[0].sum()

        found = np.asarray(jax.grad(surrogate)(jnp.full(DRAWS, THETA)), np.float64)
        assert found.mean() == pytest.approx(0.0240, abs=4 * deviation / DRAWS**0.5 + 1e-4)
        assert found.std() == pytest.approx(deviation, abs=6e-4)


class TestStraightThrough:
    def test_the_forward_value_is_exact_where_adding_the_difference_rounds(self):
        hard, soft = jnp.asarray(8 * np.random.default_rng(0).random((2, 4096)), jnp.float32)
        assert (np.asarray(soft + (hard - soft)) != hard).any()
        np.testing.assert_array_equal(straight_through(hard, soft), hard)
        np.testing.assert_array_equal(jax.jit(straight_through)(hard, soft), hard)

    def test_the_gradient_is_that_of_the_soft_value(self):
        soft_grad = jax.grad(lambda t: jax.nn.sigmoid(t) * 3)(0.7)
        for_gate = jax.grad(lambda t: binary_straight_through(t[None])[0] * 3)(0.7)
        np.testing.assert_allclose(for_gate, soft_grad, rtol=1e-6)

    def test_one_hot_draws_follow_the_softmax(self):
        logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        drawn = one_hot_straight_through(jnp.broadcast_to(logits, (DRAWS, 3)), KEY)
        assert set(np.unique(np.asarray(drawn))) == {0.0, 1.0}
        np.testing.assert_allclose(drawn.mean(0), [0.5, 0.3, 0.2], atol=0.005)

    def test_a_linear_loss_is_where_the_softmax_gradient_is_exact(self):
        losses, logits = np.array([0.2, -1.0, 0.7, 0.1]), np.array([0.1, 0.5, -0.3, 0.0])
        wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (9, 4))
        worth = jnp.asarray(losses, jnp.float32)
        found = jax.grad(lambda t: (one_hot_straight_through(t, KEY) @ worth).sum())(wide)
        exact = slow.gradient_over_choice(losses, logits)
        np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), atol=1e-6)


class TestWithoutAKey:
    @pytest.mark.parametrize("name", GATES)
    def test_gates_are_functions_of_their_logits(self, name):
        gate, logits = GATES[name](), jnp.array([-30.0, -0.1, 0.1, 30.0])
        first, again = gate(logits), jax.jit(gate)(logits)
        np.testing.assert_array_equal(first, again)
        assert first[0] == 0 and first[-1] == 1
        if gate.binary:
            np.testing.assert_array_equal(first, [0, 0, 1, 1])
        assert not np.array_equal(gate(jnp.zeros(64), KEY), gate(jnp.zeros(64), jax.random.key(1)))

    @pytest.mark.parametrize("gate", [one_hot_straight_through, gumbel_softmax])
    def test_the_likeliest_entry(self, gate):
        np.testing.assert_array_equal(gate(jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 0.0]])), [[0, 1, 0], [1, 0, 0]])


class TestGatesByName:
    @pytest.mark.parametrize("name", GATES)
    @pytest.mark.parametrize("theta", [-1.0, 0.4, 2.0])
    def test_a_drawn_gate_is_on_as_often_as_it_says(self, name, theta):
        gate = GATES[name]()
        drawn = np.asarray(gate(jnp.full(DRAWS, theta), KEY))
        assert (drawn != 0).mean() == pytest.approx(float(gate.on(jnp.float32(theta))), abs=0.005)
        assert set(np.unique(drawn)) == {0.0, 1.0} or not gate.binary

    @pytest.mark.parametrize("name", GATES)
    def test_a_key_for_each_row_makes_rows_independent_of_their_batch(self, name):
        gate, keys, logits = GATES[name](), jax.random.split(KEY, 4), jnp.zeros((4, 16))
        np.testing.assert_array_equal(gate(logits, keys)[2:3], gate(logits[2:3], keys[2:3]))

    @pytest.mark.parametrize(
        "name, settings, said",
        [
            ("gumbel", {"temperature": 0.0}, "0.0 is not positive"),
            ("hard_concrete", {"temperature": -1.0}, "-1.0 is not positive"),
            ("hard_concrete", {"low": 0.0}, "ever be off"),
            ("hard_concrete", {"high": 1.0}, "ever be fully on"),
        ],
    )
    def test_settings_without_sense_are_refused(self, name, settings, said):
        with pytest.raises(ConfigError, match=said):
            GATES[name](**settings)


class TestHardConcrete:
    def test_it_is_exactly_0_or_1_with_positive_probability_and_flat_there(self):
        drawn, pull = jax.vjp(lambda t: hard_concrete(t, KEY), jnp.zeros(DRAWS))
        ends = (np.asarray(drawn) == 0) | (np.asarray(drawn) == 1)
        assert 0.1 < ends.mean() < 0.9
        (slope,) = pull(jnp.ones(DRAWS))
        assert (np.asarray(slope)[ends] == 0).all() and (np.asarray(slope)[~ends] > 0).all()

    def test_what_a_budget_counts_has_the_gradient_of_a_sigmoid(self):
        t = jnp.float32(0.3)
        p = hard_concrete_on(t)
        np.testing.assert_allclose(jax.grad(hard_concrete_on)(t), p * (1 - p), rtol=1e-5)


class TestTopK:
    def test_drawn_without_replacement_from_the_softmax(self):
        p = np.array([0.4, 0.3, 0.2, 0.1])
        drawn = np.asarray(gumbel_top_k(jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (DRAWS, 4)), 2, KEY))
        assert (drawn[:, 0] != drawn[:, 1]).all() and drawn.dtype == np.int32
        for i, j in itertools.permutations(range(4), 2):
            often = ((drawn[:, 0] == i) & (drawn[:, 1] == j)).mean()
            assert often == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.005)
        np.testing.assert_array_equal(gumbel_top_k(jnp.array([0.1, 3.0, 2.0]), 2), [1, 2])

    def test_the_indicator_breaks_ties_by_place_and_leaves_masked_entries_out(self):
        scores, mask = jnp.array([[1.0, 1.0, 1.0, 9.0]]), jnp.array([[True, True, True, False]])
        np.testing.assert_array_equal(top_k_indicator(scores, 2), [[1, 0, 0, 1]])
        np.testing.assert_array_equal(top_k_indicator(scores, 2, mask), [[1, 1, 0, 0]])
        np.testing.assert_array_equal(top_k_indicator(scores, 4, mask), [[1, 1, 1, 0]])

    def test_straight_through_top_k_has_the_gradient_of_what_is_soft(self):
        scores, weights = jnp.array([0.3, -0.2, 0.9, 0.0]), jnp.array([1.0, 2.0, -1.0, 0.5])
        mask = jnp.array([True, True, True, False])
        value, grad = jax.value_and_grad(lambda s: straight_through_top_k(s, 2, mask=mask) @ weights)(scores)
        assert value == 0.0  # 1 − 1
        exact = -2 * slow.gradient_over_choice(-np.asarray(weights[:3]), np.asarray(scores[:3]))
        np.testing.assert_allclose(grad, [*exact, 0.0], atol=1e-6)
        own = jax.grad(lambda s: straight_through_top_k(s, 2, soft=jnp.tanh(s)) @ weights)(scores)
        np.testing.assert_allclose(own, weights * (1 - jnp.tanh(scores) ** 2), rtol=1e-5)


class TestGatesThatMultiply:
    def test_paths_not_taken_know_nothing(self):
        scores, chosen = jnp.array([0.3, 0.9, -0.5]), jnp.array([True, False, True])
        np.testing.assert_allclose(multiplicative_gate(scores, chosen), [0.3, 0, -0.5])
        grad = jax.grad(lambda s: (multiplicative_gate(s, chosen) * jnp.array([2.0, 3.0, 4.0])).sum())(scores)
        np.testing.assert_array_equal(grad, [2, 0, 4])

    def test_a_learned_temperature_changes_the_gate_and_not_the_choice(self):
        logits = jnp.array([[0.0, 1.0], [2.0, 0.0]])
        active, gate = learned_temperature_gate(logits, jnp.float32(0))
        warm_active, warm = learned_temperature_gate(logits, jnp.log(jnp.float32(4)))
        np.testing.assert_array_equal(active, [True, False])
        np.testing.assert_array_equal(warm_active, active)
        np.testing.assert_allclose(gate, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))], rtol=1e-6)
        np.testing.assert_allclose(warm, [1 / (1 + np.exp(-0.25)), 1 / (1 + np.exp(-0.5))], rtol=1e-6)
        slope = jax.grad(lambda t: learned_temperature_gate(logits, t)[1].sum())(jnp.float32(0))
        assert slope < 0


class TestReinforceOfSeveralGates:
    """A loss in which five gates meet, against counting all 32 settings."""

    LOGITS = np.array([0.4, -0.7, 1.2, 0.0, -0.3])
    WORTH = np.array([1.0, -0.5, 0.8, 0.3, -1.2])

    def loss(self, z):
        return float(np.tanh(np.dot(z, self.WORTH)) + 0.5 * z[0] * z[2])

    def found(self, baseline_of):
        n = 40_000
        logits = jnp.broadcast_to(jnp.asarray(self.LOGITS, jnp.float32), (n, 5))
        z = binary_straight_through(logits, KEY)
        reward = -(jnp.tanh(z @ jnp.asarray(self.WORTH, jnp.float32)) + 0.5 * z[:, 0] * z[:, 2])

        def surrogate(logits):
            log_probability = bernoulli_log_probability(logits, z).sum(-1)
            return reinforce_terms(log_probability, baseline_of(reward), reward)[0].sum()

        each = np.asarray(jax.grad(surrogate)(logits))
        return each.mean(0), each.std(0) / n**0.5

    @pytest.mark.parametrize("baseline", ["none", "constant", "moving", "leave_one_out"])
    def test_every_baseline_leaves_the_expected_gradient_as_it_is(self, baseline):
        moving = moving_baseline(jnp.array([-0.3, 1.0]), jnp.zeros(1))[0]
        of = {
            "none": lambda reward: 0.0,
            "constant": lambda reward: -0.7,
            "moving": lambda reward: moving,
            "leave_one_out": leave_one_out,
        }
        mean, error = self.found(of[baseline])
        exact = slow.gradient_over_gates(self.loss, self.LOGITS)
        assert (np.abs(mean - exact) < 4 * error + 1e-5).all()
        assert error.max() < 0.1 * np.abs(exact).max()

    def test_leaving_the_own_draw_in_would_be_biased_for_few_draws(self):
        reward = jnp.array([[1.0, 5.0], [3.0, 1.0], [8.0, 0.0]])
        np.testing.assert_allclose(leave_one_out(reward), [[5.5, 0.5], [4.5, 2.5], [2.0, 3.0]])
        with pytest.raises(ValueError, match="two draws or more"):
            leave_one_out(reward[:1])

    def test_a_moving_baseline_is_the_mean_of_what_came_before(self):
        state = jnp.zeros(2)
        seen, rewards = [], [4.0, 2.0, 9.0]
        for reward in rewards:
            baseline, state = moving_baseline(state, jnp.full(3, reward), decay=0.5)
            seen.append(float(baseline))
        assert seen == pytest.approx([0.0, 4.0, (0.5 * 4 + 2) / 1.5])

    def test_a_learned_baseline_has_only_its_own_gradient(self):
        grad = jax.grad(lambda v, lp: sum(t.sum() for t in reinforce_terms(lp, v, jnp.array([2.0, 3.0]))), (0, 1))
        of_baseline, of_policy = grad(jnp.array([0.5, 5.0]), jnp.array([-1.0, -2.0]))
        np.testing.assert_allclose(of_baseline, [-3.0, 4.0])
        np.testing.assert_allclose(of_policy, [-1.5, 2.0])


def test_module_names_say_what_they_return():
    assert estimators.gumbel_softmax(jnp.zeros((2, 3)), hard=False).dtype == jnp.float32
    assert estimators.gumbel_softmax(jnp.zeros((2, 3), jnp.bfloat16), KEY).dtype == jnp.float32
