"""The curves of a panel: averaged without lag, thinned without losing a peak, on an axis that fits."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from bitdance_scale.observe.panel import MAX_POINTS, short, show_from_zero, show_range, smooth, thin


def test_smoothing_averages_both_neighbourhoods():
    # Equal up to the rounding of the running sums.
    np.testing.assert_allclose(smooth(np.full(400, 7.0)), 7.0, rtol=1e-12)
    # 600 points have a reach of 10: the weight at a distance of k is 0.9^k.
    values = np.random.default_rng(0).random(600)
    weights = 0.9 ** np.abs(np.arange(600) - 5)
    np.testing.assert_allclose(smooth(values)[5], (weights * values).sum() / weights.sum(), rtol=1e-12)


def test_smoothing_does_not_lag():
    # On a straight line, away from its ends, up to what the weights do not reach.
    values = np.linspace(0, 1, 600)
    np.testing.assert_allclose(smooth(values)[250:350], values[250:350], rtol=1e-6)


def test_smoothing_leaves_out_what_is_not_finite():
    assert smooth(np.array([np.nan, 1.0, np.inf, 3.0])).tolist()[1::2] == [1.0, 3.0]
    assert np.isnan(smooth(np.array([np.nan, np.nan]))).all()
    assert len(smooth(np.empty(0))) == 0


def test_thinning_keeps_every_peak():
    steps = np.arange(1, 100_001)
    values = np.random.default_rng(0).random(100_000)
    values[[17, 70_000]] = 9.0, -9.0
    values[40_000:41_000] = np.nan
    thin_steps, thin_values = thin(steps, values)
    assert len(thin_steps) == MAX_POINTS and (np.diff(thin_steps) > 0).sum() >= MAX_POINTS - 20
    assert np.array_equal(values[thin_steps - 1], thin_values, equal_nan=True)
    assert 18 in thin_steps and 70_001 in thin_steps
    assert np.isnan(thin_values[(thin_steps > 40_200) & (thin_steps < 40_800)]).all()


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.4, 0.5], "linear"), ([0.4, 40.0], "log"), ([0.0, 40.0], "linear"), ([np.nan, np.inf], "linear")],
)
def test_a_wide_range_is_logarithmic(values, scale):
    axes = Figure().subplots()
    show_range(axes, [np.array(values)])
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low < value < high for value in values if np.isfinite(value))


def test_a_panel_from_zero_shows_its_highest():
    axes = Figure().subplots()
    show_from_zero(axes)
    axes.plot([1, 2, 3], [2.0, np.nan, 4.0])
    show_from_zero(axes)
    assert axes.get_ylim()[0] == 0 and 4 < axes.get_ylim()[1] < 5
    show_from_zero(axes, least_top=10)
    assert axes.get_ylim()[1] > 10


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1.5e-3, "1.5e-3"), (1500, "1,500"), (20_000, "20k"), (2.5e6, "2.5M"), (333e9, "333B")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text
