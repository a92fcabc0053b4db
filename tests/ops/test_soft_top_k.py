"""The relaxed top-k of CoLT5 against its exact solution, and at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.estimators import top_k_indicator
from sparsejax.ops.soft_top_k import soft_top_k

from reference import estimators as slow

SCORES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 64)), jnp.float32)


@pytest.mark.parametrize("epsilon, most", [(1.0, 1e-4), (0.3, 1e-3), (0.1, 0.01)])
def test_with_enough_iterations_it_is_the_exact_solution(epsilon, most):
    out = soft_top_k(SCORES, 8, epsilon=epsilon, iterations=400)
    exact = [slow.soft_top_k(np.asarray(row, np.float64), 8, epsilon) for row in SCORES]
    assert out.weights.dtype == jnp.float32
    np.testing.assert_allclose(out.weights, exact, atol=most)
    assert out.residual.max() < 10 * most


def test_the_residual_says_how_far_a_sum_is_from_k():
    out = soft_top_k(SCORES, 8, epsilon=0.03, start=0.03, iterations=50)
    np.testing.assert_allclose(out.residual, np.abs(np.asarray(out.weights).sum(-1) - 8), rtol=1e-5)
    assert out.residual.mean() > 1, "a fixed small ε is known not to converge in 50 iterations"
    annealed = soft_top_k(SCORES, 8, epsilon=0.03, iterations=50)
    assert annealed.residual.mean() < 0.25 * out.residual.mean()


def test_weights_lie_between_0_and_1_and_do_not_see_a_shift():
    out = soft_top_k(SCORES, 8)
    assert out.weights.min() >= 0 and out.weights.max() <= 1
    np.testing.assert_allclose(soft_top_k(SCORES + 3, 8, epsilon=0.3).weights,
                               soft_top_k(SCORES, 8, epsilon=0.3).weights, atol=2e-5)  # fmt: skip


def test_a_small_epsilon_gives_the_k_largest():
    scores = jnp.asarray(
        np.random.default_rng(1).permuted(np.tile(np.linspace(-1, 1, 16), (4, 1)), axis=1), jnp.float32
    )
    out = soft_top_k(scores, 5, epsilon=1e-3, iterations=800, decay=0.97)
    np.testing.assert_allclose(out.weights, top_k_indicator(scores, 5), atol=1e-3)


def test_masked_entries_get_nothing_and_change_nothing():
    mask = jnp.arange(64) < 40
    out = soft_top_k(jnp.where(mask, SCORES, 50.0), 8, mask & jnp.ones((6, 1), bool), epsilon=0.1)
    np.testing.assert_array_equal(out.weights[:, 40:], 0)
    np.testing.assert_allclose(out.weights[:, :40], soft_top_k(SCORES[:, :40], 8, epsilon=0.1).weights, atol=1e-6)


def test_no_more_than_k_entries_all_get_1():
    mask = jnp.arange(64)[None] < jnp.array([[0], [3], [8], [9], [64], [64]])
    out = soft_top_k(SCORES, 8, mask)
    np.testing.assert_array_equal(out.weights[:3], mask[:3])
    np.testing.assert_array_equal(out.residual[:3], 0)
    assert (out.residual[3:] > 0).all()
    np.testing.assert_array_equal(soft_top_k(SCORES, 64).weights, 1)


def test_gradients_are_those_of_the_exact_solution_and_finite():
    epsilon, row = 0.3, SCORES[:1]
    direction = np.random.default_rng(2).normal(size=(1, 64))
    worth = jnp.asarray(direction, jnp.float32)
    grad = jax.grad(lambda s: (soft_top_k(s, 8, epsilon=epsilon, iterations=300).weights * worth).sum())(row)
    weights = slow.soft_top_k(np.asarray(row[0], np.float64), 8, epsilon)
    free = np.where(weights < 1, weights, 0)
    exact = free / epsilon * (direction[0] - (free * direction[0]).sum() / free.sum())
    np.testing.assert_allclose(grad[0], exact, atol=2e-3 * np.abs(exact).max())
    for mask in (jnp.zeros((6, 64), bool), jnp.arange(64)[None] < jnp.array([[0], [3], [8], [9], [64], [64]])):
        grad = jax.grad(lambda s: jnp.square(soft_top_k(s, 8, mask).weights).sum())(SCORES)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("settings", [{"k": 0}, {"epsilon": 0.0}, {"iterations": 0}, {"iterations": 5}])
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be positive|above epsilon"):
        soft_top_k(SCORES, **({"k": 8} | settings))
