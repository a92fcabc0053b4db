"""Budget losses at known points, and a hard budget that a trained model of gates keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.ops import budgets
from sparsejax.ops.gates import Gumbel


class TestWhatIsSpent:
    def test_a_share_of_the_whole_weighted_by_cost(self):
        spent = budgets.spent(jnp.array([[1.0, 0.0], [1.0, 1.0], [0.5, 0.25]]), jnp.array([3.0, 1.0]))
        np.testing.assert_allclose(spent, [0.75, 1.0, 0.4375], rtol=1e-6)

    def test_sums_leave_masked_tokens_out(self):
        spent, mask = jnp.array([0.2, 0.9, 0.5]), jnp.array([True, False, True])
        np.testing.assert_allclose(budgets.linear_sum(spent, mask), 0.7, rtol=1e-6)
        np.testing.assert_allclose(budgets.token_l1_sum(spent, 0.4, mask), 0.3, rtol=1e-6)
        np.testing.assert_allclose(budgets.linear_sum(spent), 1.6, rtol=1e-6)

    def test_a_target_for_tokens_is_not_one_for_their_mean(self):
        spent = jnp.array([0.0, 0.8])
        np.testing.assert_allclose(budgets.batch_l1(spent.mean(), 0.4), 0, atol=1e-7)
        np.testing.assert_allclose(budgets.batch_l2(spent.mean(), 0.5), 0.01, rtol=1e-5)
        np.testing.assert_allclose(budgets.token_l1_sum(spent, 0.4), 0.8, rtol=1e-6)


class TestPriors:
    def test_geometric_with_the_rest_at_the_end(self):
        np.testing.assert_allclose(budgets.geometric_prior(0.2, 4), [0.2, 0.16, 0.128, 0.512], rtol=1e-6)
        np.testing.assert_array_equal(budgets.geometric_prior(1.0, 3), [1, 0, 0])
        np.testing.assert_array_equal(budgets.geometric_prior(0.3, 1), [1])

    def test_gaussian_about_a_depth(self):
        prior = budgets.gaussian_prior(3.0, 1.0, 5)
        np.testing.assert_allclose(prior.sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(prior[0] / prior[2], np.exp(-2), rtol=1e-5)
        np.testing.assert_allclose(prior, prior[::-1], rtol=1e-6)

    @pytest.mark.parametrize("make", [lambda: budgets.geometric_prior(0.0, 3), lambda: budgets.gaussian_prior(2, 0, 3)])
    def test_those_without_sense_are_refused(self, make):
        with pytest.raises(ValueError, match=r"outside \(0, 1\]|not positive"):
            make()

    def test_kl_is_0_at_the_prior_and_counts_by_hand(self):
        prior = budgets.geometric_prior(0.2, 4)
        np.testing.assert_allclose(budgets.kl_to_prior(prior, prior), 0, atol=1e-7)
        p = jnp.array([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]])
        expected = [np.log(1 / 0.2), 0.5 * np.log(0.5 / 0.16) + 0.5 * np.log(0.5 / 0.128)]
        np.testing.assert_allclose(budgets.kl_to_prior(p, prior), expected, rtol=1e-6)
        assert np.isfinite(jax.grad(lambda p: budgets.kl_to_prior(p, prior).sum())(p)).all()
        assert budgets.kl_to_prior(jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])) == np.inf
        assert budgets.kl_to_prior(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])) == 0


class TestAlignment:
    def test_binary_cross_entropy_to_what_was_selected(self):
        logits, selected = jnp.array([0.3, -2.0, 50.0]), jnp.array([True, False, False])
        expected = np.log1p(np.exp(-0.3)) + np.log1p(np.exp(-2.0)) + 50
        np.testing.assert_allclose(budgets.alignment_sum(logits, selected), expected, rtol=1e-6)
        found = jax.grad(lambda t: budgets.alignment_sum(t, selected, jnp.array([True, True, False])))(logits)
        sigma = 1 / (1 + np.exp(-np.array([0.3, -2.0])))
        np.testing.assert_allclose(found, [sigma[0] - 1, sigma[1], 0], rtol=1e-5)


class TestPrice:
    def test_it_rises_above_the_budget_falls_below_and_stays_between_its_bounds(self):
        step = lambda price, mean, **kw: float(budgets.next_price(jnp.float32(price), mean, 0.4, rate=0.5, **kw))  # noqa: E731
        assert step(1.0, 0.6) == pytest.approx(1.1)
        assert step(1.0, 0.2) == pytest.approx(0.9)
        assert step(0.05, 0.2) == 0.0
        assert step(0.05, 0.2, least=-1.0) == pytest.approx(-0.05)
        assert step(1.0, 0.9, most=1.2) == pytest.approx(1.2)

    def test_its_term_pushes_what_is_spent_and_never_the_price(self):
        term = lambda mean, price: budgets.priced(mean, price, 0.4, damping=2.0)  # noqa: E731
        of_mean, of_price = jax.grad(term, (0, 1))(jnp.float32(0.6), jnp.float32(1.5))
        np.testing.assert_allclose([of_mean, of_price], [1.5 + 2 * 0.2, 0], rtol=1e-5)


COSTS, BATCH = jnp.array([1.0, 2.0, 1.0, 3.0, 1.0, 2.0]), 256


def trained(budget: float, steps: int = 1200) -> tuple[float, float, float]:
    """(share spent in evaluation, loss there, loss of a random choice of the same share) of six modules, each of which
    a token's gate may leave out: what is lost by that differs from token to token."""
    gate, estimator = optax.adam(optax.cosine_decay_schedule(0.05, steps, 0.02)), Gumbel(temperature=1.0)
    worth = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)

    def data(key):
        x = jax.random.normal(key, (BATCH, 8))
        return x, jnp.abs(x @ worth)

    def lost(gates, values):
        return jnp.mean(jnp.sum(jnp.square(values) * (1 - gates), axis=-1))

    def logits_of(params, values):
        return params["slope"] * values + params["bias"]

    def loss(params, key, price):
        x_key, gate_key = jax.random.split(key)
        _, values = data(x_key)
        logits = logits_of(params, values)
        mean = budgets.spent(estimator.on(logits), COSTS).mean()
        in_evaluation = budgets.spent(estimator(logits), COSTS).mean()
        return lost(estimator(logits, gate_key), values) + budgets.priced(mean, price, budget), in_evaluation

    def step(carry, key):
        params, moments, price = carry
        (_, mean), grads = jax.value_and_grad(loss, has_aux=True)(params, key, price)
        updates, moments = gate.update(grads, moments)
        price = budgets.next_price(price, mean, budget, rate=2.0, most=1e4)
        return (optax.apply_updates(params, updates), moments, price), mean

    @jax.jit
    def run():
        params = {"slope": jnp.ones(6), "bias": jnp.zeros(6)}
        start = params, gate.init(params), jnp.float32(0)
        (params, _, _), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), steps))
        many = jnp.concatenate([data(key)[1] for key in jax.random.split(jax.random.key(2), 16)])
        gates = estimator(logits_of(params, many))
        spent = budgets.spent(gates, COSTS).mean()
        blind = jax.random.uniform(jax.random.key(3), gates.shape) < spent
        return spent, lost(gates, many), lost(blind, many)

    return tuple(map(float, run()))


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_who_asks_for_a_share_gets_it(budget):
    spent, loss, blind = trained(budget)
    assert spent == pytest.approx(budget, abs=0.01)
    assert loss < 0.7 * blind, "the gates have to know what is worth its cost"
