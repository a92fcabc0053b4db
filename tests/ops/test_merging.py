"""Merging of tokens: against a loop, and what must not change."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.merging import destinations, merged

SEGMENTS = np.array([[1] * 9 + [2] * 6 + [0], [1] * 16], np.int32)


def given(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 16, 4)).astype(np.float32), (SEGMENTS > 0) & (rng.random((2, 16)) < 0.9)


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def slow_destinations(metric, alive, segments, count):
    into = np.full(segments.shape, -1)
    for b in range(len(segments)):
        for document in set(segments[b].tolist()) - {0}:
            living = [t for t in range(16) if segments[b, t] == document and alive[b, t]]
            pairs = []
            for a in living[1::2]:
                best = max(living[2::2], key=lambda t, a=a: cosine(metric[b, a], metric[b, t]), default=None)
                if best is not None:
                    pairs.append((-cosine(metric[b, a], metric[b, best]), a, best))
            for _, a, best in sorted(pairs)[:count]:
                into[b, a] = best
    return into


@pytest.mark.parametrize("count", [0, 2, 99])
def test_against_a_loop(count):
    metric, alive = given()
    into = destinations(jnp.asarray(metric), jnp.asarray(alive), jnp.asarray(SEGMENTS), jnp.full((2, 16), count))
    expected = slow_destinations(metric, alive, SEGMENTS, count)
    assert np.array_equal(into, expected)
    assert (expected >= 0).any() == (count > 0)


def test_sizes_add_up_and_nothing_joined_leaves_all_as_it_was():
    metric, alive = given(1)
    size = jnp.asarray(alive, jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 16, 3)), jnp.float32)
    for count in (0, 3):
        into = destinations(jnp.asarray(metric), jnp.asarray(alive), jnp.asarray(SEGMENTS), jnp.full((2, 16), count))
        y, new = merged(x, size, into)
        assert np.array_equal(new.sum(-1), size.sum(-1))
        np.testing.assert_allclose((new[..., None] * y).sum(1), (size[..., None] * x).sum(1), rtol=1e-5, atol=1e-5)
        assert (new == 0).sum() == (size == 0).sum() + (into >= 0).sum()
        if count == 0:
            assert np.array_equal(x, y) and np.array_equal(size, new)


def test_a_constant_stays_constant():
    metric, alive = given(3)
    x = jnp.full((2, 16, 3), 1.7)
    into = destinations(jnp.asarray(metric), jnp.asarray(alive), jnp.asarray(SEGMENTS), jnp.full((2, 16), 3))
    np.testing.assert_allclose(merged(x, jnp.asarray(alive, jnp.float32), into)[0], x, rtol=1e-6)
