"""Sampling: which tokens may be drawn, exactly; how often they are, by statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import RequestError
from sparsejax.infer.sampling import Sampling, likeliest, sample

P_V = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)
LOGITS_V = jnp.log(P_V)


def draws(logits_V, sampling, count=4000, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: sample(key, logits_V, sampling)))(keys))


def frequencies(tokens):
    return np.bincount(tokens, minlength=len(P_V)) / len(tokens)


class TestLikeliest:
    @pytest.mark.parametrize(
        ("top_k", "top_p", "allowed"),
        [
            (1, None, {1}),
            (3, None, {1, 3, 4}),
            (99, None, {0, 1, 2, 3, 4}),
            (None, 0.0, {1}),
            (None, 0.39, {1}),
            (None, 0.41, {1, 3}),  # the token that crosses the mass belongs to it
            (None, 0.69, {1, 3}),
            (None, 0.71, {1, 3, 4}),
            (None, 1.0, {0, 1, 2, 3, 4}),
            (2, 0.6, {1, 3}),  # of what top_k leaves token 1 has 0.571
            (2, 0.56, {1}),
            (3, 0.9, {1, 3, 4}),
        ],
    )
    def test_the_mask_is_exact(self, top_k, top_p, allowed):
        assert set(np.flatnonzero(likeliest(LOGITS_V, top_k, top_p))) == allowed

    def test_ties_leave_no_more_than_k(self):
        mask = likeliest(jnp.array([0.0, 1.0, 1.0, 1.0, 0.0]), 2, None)
        assert list(np.flatnonzero(mask)) == [1, 2]


class TestSample:
    def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first(self):
        assert set(draws(LOGITS_V, Sampling(temperature=0), 50)) == {1}
        assert set(draws(jnp.array([0.0, 2.0, 2.0]), Sampling(temperature=0), 50)) == {1}

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_one_candidate_is_greedy_at_any_temperature(self, temperature):
        assert set(draws(LOGITS_V, Sampling(temperature=temperature, top_k=1), 50)) == {1}
        assert set(draws(LOGITS_V, Sampling(temperature=temperature, top_p=0.0), 50)) == {1}

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_are_those_of_the_softmax_at_the_temperature(self, temperature):
        want = P_V ** (1 / temperature) / (P_V ** (1 / temperature)).sum()
        np.testing.assert_allclose(frequencies(draws(LOGITS_V, Sampling(temperature=temperature))), want, atol=0.03)

    def test_what_is_cut_off_is_never_drawn_and_the_rest_keep_their_proportions(self):
        found = frequencies(draws(LOGITS_V, Sampling(top_p=0.8)))
        np.testing.assert_allclose(found, np.where(P_V >= 0.15, P_V, 0) / 0.85, atol=0.03)
        assert found[0] == found[2] == 0

    def test_top_p_counts_probability_after_the_temperature(self):
        # At temperature 2 the largest has only 0.30 of the mass, at 1 it has 0.40.
        assert set(draws(LOGITS_V, Sampling(temperature=1.0, top_p=0.35))) == {1}
        assert set(draws(LOGITS_V, Sampling(temperature=2.0, top_p=0.35))) == {1, 3}

    def test_a_cut_changes_only_draws_that_it_forbids(self):
        free, cut = draws(LOGITS_V, Sampling()), draws(LOGITS_V, Sampling(top_k=3))
        allowed = np.isin(free, [1, 3, 4])
        assert allowed.any() and not allowed.all()
        np.testing.assert_array_equal(cut[allowed], free[allowed])

    @pytest.mark.parametrize("temperature", [1e-38, 1e-6, float("inf")])
    def test_extreme_temperatures_stay_finite(self, temperature):
        found = set(draws(LOGITS_V, Sampling(temperature=temperature, top_p=0.99)))
        assert found == ({1} if temperature < 1 else {0, 1, 2, 3, 4})


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 1.1}, {"top_p": -0.1}]
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        Sampling(**settings)
