"""The constant-memory permutation and the keyed draws."""

from __future__ import annotations

import numpy as np
import pytest

from bitdance_scale.data.plan.permutation import Permutation, uniform


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_000])
def test_is_a_bijection(size: int) -> None:
    items = Permutation(size, (1, 2))(np.arange(size))
    assert items.dtype == np.int64
    assert np.array_equal(np.sort(items), np.arange(size))


def test_depends_on_the_key_alone() -> None:
    positions = np.arange(5000)
    first = Permutation(5000, (1, 2, 3))(positions)
    assert np.array_equal(first, Permutation(5000, (1, 2, 3))(positions))
    assert np.array_equal(first[17:19], Permutation(5000, (1, 2, 3))(np.array([17, 18])))
    for key in ((1, 2, 4), (2, 1, 3), (1, 2), (1, 2, 3, 0)):
        # Two random orders agree at one place in 5000 on average (Poisson); 12 has probability below 1e-9.
        assert (first == Permutation(5000, key)(positions)).sum() < 12


def test_known_values_never_change() -> None:
    """A resumed run must find the order it began with, whatever version of this code wrote its checkpoint."""
    assert Permutation(1000, (0, 1, 256, 0))(np.arange(6)).tolist() == [467, 54, 73, 653, 189, 369]
    draws = uniform((0, 2, 256, 0), np.arange(3)).tolist()
    assert draws == [0.3880592624608975, 0.032084964407363636, 0.44780029510268493]


def test_order_is_mixed() -> None:
    size = 1 << 16
    items = Permutation(size, (7,))(np.arange(size)).astype(np.float64)
    # Correlation of a random permutation with the identity has standard deviation 1 / sqrt(size) = 0.004; 5 of them.
    assert abs(np.corrcoef(np.arange(size), items)[0, 1]) < 0.02
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.02


def test_uniform_is_uniform_and_independent_of_its_neighbours() -> None:
    draws = uniform((3, 1), np.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    # Standard deviation of the share below 0.1 is 0.00095; of a decile's count 95. Five of each.
    assert abs((draws < 0.1).mean() - 0.1) < 0.005
    assert np.abs(np.histogram(draws, bins=10)[0] - 10_000).max() < 475
    assert abs(np.corrcoef(draws, uniform((3, 2), np.arange(100_000)))[0, 1]) < 0.016
