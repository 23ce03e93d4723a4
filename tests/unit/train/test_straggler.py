from __future__ import annotations

import math

import pytest

from bitdance_scale.train.straggler import Straggler, find_straggler


def test_the_slowest_rank_is_named_when_it_is_a_tenth_behind() -> None:
    assert find_straggler([1.0, 1.02, 1.3, 0.98], [0] * 4) == Straggler(2, pytest.approx(0.3))


def test_none_is_named_within_a_tenth() -> None:
    assert find_straggler([1.0, 1.05], [0, 0]) == Straggler(-1, pytest.approx(0.05))


def test_ranks_are_compared_within_their_group() -> None:
    # The second stage is three times as heavy; of its ranks the last one is slow.
    assert find_straggler([1.0, 1.05, 3.0, 3.9], [0, 0, 1, 1]) == Straggler(3, pytest.approx(0.3))


def test_a_slow_rank_does_not_raise_what_it_is_compared_with() -> None:
    assert find_straggler([1.0, 9.0], [0, 0]) == Straggler(1, pytest.approx(8.0))


def test_ranks_without_a_measurement_and_ranks_alone_are_left_out() -> None:
    assert find_straggler([math.nan, 1.0], [0, 0]) == Straggler()
    assert find_straggler([1.0, 5.0], [0, 1]) == Straggler()
