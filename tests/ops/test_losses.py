"""Losses at the points where their values are known, and against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.losses import cross_entropy_sum, hits, load_balance, router_z_sum

from reference import routing as slow
from reference.attention import cross_entropy_sum as slow_cross_entropy
from support import assert_close


def random(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


class TestCrossEntropy:
    def test_against_a_loop_over_positions(self):
        rng = np.random.default_rng(1)
        logits, targets, mask = random((2, 5, 7), scale=3), rng.integers(0, 7, (2, 5)), rng.random((2, 5)) < 0.7
        expected = slow_cross_entropy(np.asarray(logits), targets, mask)
        assert_close(cross_entropy_sum(logits, jnp.asarray(targets), jnp.asarray(mask)), np.float32(expected), 1e-6)

    def test_uniform_logits_cost_log_v(self):
        total = cross_entropy_sum(jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool))
        np.testing.assert_allclose(total, 3 * math.log(8), rtol=1e-6)

    def test_bfloat16_logits_are_summed_in_float32(self):
        logits = random((1, 64, 9)).astype(jnp.bfloat16)
        targets, mask = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), bool)
        total = cross_entropy_sum(logits, targets, mask)
        assert total.dtype == jnp.float32
        expected = slow_cross_entropy(np.asarray(logits.astype(jnp.float32)), np.asarray(targets), np.asarray(mask))
        np.testing.assert_allclose(total, expected, rtol=1e-6)

    def test_masked_positions_have_no_gradient(self):
        mask = jnp.array([[True, False, True]])
        grad = jax.grad(lambda logits: cross_entropy_sum(logits, jnp.zeros((1, 3), jnp.int32), mask))(random((1, 3, 4)))
        assert (np.asarray(grad)[0, 1] == 0).all() and (np.asarray(grad)[0, 0] != 0).all()


class TestLoadBalance:
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_one_when_balanced_whatever_k(self, k):
        counts, tokens = jnp.full(8, 3 * k), jnp.int32(24)
        np.testing.assert_allclose(load_balance(counts, jnp.full(8, 24 / 8), tokens, k), 1.0, rtol=1e-6)

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_e_over_k_when_collapsed(self, k):
        on = jnp.arange(8) < k
        value = load_balance(jnp.where(on, 24, 0), jnp.where(on, 24 / k, 0.0), jnp.int32(24), k)
        np.testing.assert_allclose(value, 8 / k, rtol=1e-6)

    def test_against_a_loop_and_by_unit(self):
        rng = np.random.default_rng(2)
        counts, p = rng.integers(0, 9, (3, 5)), rng.dirichlet(np.ones(5), (3, 11))
        value = load_balance(jnp.asarray(counts), jnp.asarray(p.sum(1), jnp.float32), jnp.full(3, 11), 2)
        assert_close(value, np.array([slow.balance(c, q, 2) for c, q in zip(counts, p, strict=True)], np.float32), 1e-6)

    def test_a_unit_without_tokens_gives_zero(self):
        assert load_balance(jnp.zeros(4, jnp.int32), jnp.zeros(4), jnp.int32(0), 2) == 0

    def test_the_gradient_is_that_of_the_probabilities_with_loads_held(self):
        counts = jnp.array([6, 3, 3, 0])
        grad = jax.grad(lambda p: load_balance(counts, p, jnp.int32(12), 1))(jnp.full(4, 3.0))
        np.testing.assert_allclose(grad, 4 * np.array([6, 3, 3, 0]) / 12 / 12, rtol=1e-6)

    def test_counts_above_bfloat16_and_float16_integers_are_exact(self):
        counts = jnp.array([2**20 + 1, 2**20 - 1])
        p = jnp.array([2.0**20, 2.0**20])
        np.testing.assert_allclose(load_balance(counts, p, jnp.int32(2**21), 1), 1.0, rtol=1e-7)


class TestRouterZ:
    def test_zero_logits_cost_log_e_squared_a_token(self):
        total = router_z_sum(jnp.zeros((1, 5, 8)), jnp.array([[True, True, True, False, False]]))
        np.testing.assert_allclose(total, 3 * math.log(8) ** 2, rtol=1e-6)

    def test_is_of_the_logits_and_not_of_probabilities(self):
        logits, mask = random((1, 4, 8)), jnp.ones((1, 4), bool)
        # Softmax would not see the shift by 3.
        by_hand = (np.log(np.exp(np.asarray(logits, np.float64) + 3).sum(-1)) ** 2).sum()
        np.testing.assert_allclose(router_z_sum(logits + 3, mask), by_hand, rtol=1e-5)


def test_a_hit_is_a_target_above_all_others():
    logits = jnp.array([[[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0], [2.0, 2.0, 1.0]]])
    mask = jnp.array([[True, True, False, True]])
    assert hits(logits, jnp.array([[1, 0, 0, 0]]), mask).tolist() == [[True, False, False, False]]
    assert hits(logits, jnp.array([[0, 0, 0, 1]]), mask).sum() == 0
