"""The shares are exact at every prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance_scale.data.plan.apportion import Apportionment


@pytest.mark.parametrize("step", [0, 1, 7, 99_999])
def test_pretraining_mix_is_exact_in_every_batch(step: int) -> None:
    mix = Apportionment([2, 7, 1])
    labels = mix.labels(step * 2560, (step + 1) * 2560)
    assert np.bincount(labels).tolist() == [512, 1792, 256]
    assert (mix.counts_before((step + 1) * 2560) - mix.counts_before(step * 2560)).tolist() == [512, 1792, 256]


@settings(deadline=None, max_examples=60)
@given(shares=st.lists(st.integers(1, 40), min_size=1, max_size=5), start=st.integers(0, 10**9))
def test_every_prefix_is_less_than_one_off(shares: list[int], start: int) -> None:
    mix = Apportionment(shares)
    assert mix.period * np.gcd.reduce(shares) == sum(shares)
    positions = np.arange(2 * mix.period + 1)
    counts = np.array([mix.counts_before(int(position)) for position in positions])
    assert (counts.sum(axis=1) == positions).all()
    # In integers: |count * sum - position * share| < sum.
    deviation = counts * sum(shares) - positions[:, None] * np.array(shares)
    assert (np.abs(deviation) < sum(shares)).all()
    labels = mix.labels(0, 2 * mix.period)
    assert (np.diff(counts, axis=0) == (labels[:, None] == np.arange(len(shares)))).all()
    window = mix.labels(start, start + 50)
    taken = mix.counts_before(start + 50) - mix.counts_before(start)
    assert np.bincount(window, minlength=len(shares)).tolist() == taken.tolist()
