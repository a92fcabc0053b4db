"""How sure a model is."""

import numpy as np
import pytest

from sparsejax.ops.exits import largest_two


def test_the_largest_two_are_those_of_a_sort():
    values = np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)
    values[0, 0, 2:5] = 7.0  # a tie
    values[0, 1, :] = 0.0
    values[1, 0, 3:] = -np.inf
    ordered = np.sort(values, axis=-1)
    for found, expected in zip(largest_two(values), (ordered[..., -1], ordered[..., -2]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("values", [[[2.0]], [[-np.inf, 3.0]]])
def test_there_may_be_no_second(values):
    largest, second = largest_two(np.array(values, np.float32))
    assert largest.tolist() == [max(values[0])] and second.tolist() == [-np.inf]
