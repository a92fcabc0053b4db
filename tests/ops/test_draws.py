"""Noise from keys: its laws, and rows that draw the same wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import draws


def test_a_key_for_each_row_draws_the_same_whatever_rows_are_beside_it():
    keys = jax.random.split(jax.random.key(0), 6)
    whole, part = draws.uniform(keys, (6, 3, 2)), draws.uniform(keys[4:], (2, 3, 2))
    np.testing.assert_array_equal(whole[4:], part)
    assert len(np.unique(np.asarray(whole))) == 36
    square = draws.uniform(keys.reshape(2, 3), (2, 3, 3, 2))
    np.testing.assert_array_equal(square.reshape(6, 3, 2), whole)


def test_keys_that_do_not_lead_the_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(6,\) do not lead the shape \(5, 2\)"):
        draws.uniform(jax.random.split(jax.random.key(0), 6), (5, 2))


def test_gumbel_and_logistic_noise_have_their_laws():
    u = draws.uniform(jax.random.key(1), (200_000,))
    assert np.mean(draws.gumbel(u)) == pytest.approx(np.euler_gamma, abs=0.012)
    assert np.std(draws.gumbel(u)) == pytest.approx(np.pi / np.sqrt(6), abs=0.012)
    assert np.mean(draws.logistic(u)) == pytest.approx(0, abs=0.016)
    assert np.std(draws.logistic(u)) == pytest.approx(np.pi / np.sqrt(3), abs=0.016)


def test_the_ends_of_the_unit_interval_are_finite():
    ends = jnp.array([0.0, 1 - 2**-24])
    assert np.isfinite(draws.gumbel(ends)).all() and np.isfinite(draws.logistic(ends)).all()
