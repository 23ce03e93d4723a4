"""Pictures of values: what is drawn where, and which axes are logarithmic."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.report.figures import draw_categories, draw_sweep, is_logarithmic
from bitdance_scale.evaluation.report.sweep import Curve

BLUE, ORANGE = (0x1F, 0x6F, 0xB4), (0xD9, 0x72, 0x2B)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def columns_of(content: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    """Columns of the picture with this colour above the legend, which is in the lowest tenth of an inch or three."""
    image = pixels(content)[:-60]
    return np.flatnonzero((np.abs(image - colour).sum(axis=2) < 12).any(axis=0))


@pytest.mark.parametrize(
    ("positions", "is_log"),
    [
        ([10, 25, 50, 100], True),
        ([5, 10, 20, 50], True),
        ([1, 10, 100], True),
        ([1, 3, 5, 7.5, 10, 13], False),
        ([10, 20, 30], False),
        ([10, 100], False),
        ([0, 10, 100], False),
    ],
)
def test_axes_are_logarithmic_where_that_is_more_even(positions, is_log):
    assert is_logarithmic(positions) == is_log


def test_larger_values_and_wider_intervals_are_drawn_so():
    narrow = draw_categories({"a": {"overall": Estimate(0.5, 0.45, 0.55)}, "b": {"overall": Estimate(0.8, 0.6, 1.0)}})
    low, high = columns_of(narrow, BLUE), columns_of(narrow, ORANGE)
    # The axis is linear: intervals of 0.1 and 0.4, 0.05 apart. Caps and lines are some pixels wide.
    assert np.ptp(high) == pytest.approx(4 * np.ptp(low), rel=0.08)
    assert high.min() - low.max() == pytest.approx(np.ptp(low) / 2, rel=0.25)


def test_pictures_grow_with_what_they_show_within_a_bound():
    def height(num_categories: int, num_models: int) -> int:
        found = {f"category {number}": Estimate(0.5, 0.4, 0.6) for number in range(num_categories)}
        return pixels(draw_categories({f"model {number}": found for number in range(num_models)})).shape[0]

    assert height(2, 1) < height(8, 1) < height(8, 5)
    assert height(31, 1) == height(500, 1)


def test_names_may_hold_dollars_and_underscores():
    values = {name: {"$x_{$": Estimate(0.5, 0.4, 0.6)} for name in ("_first", "$second$ " + "long " * 20)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = draw_categories(values)
        draw_sweep("steps", {"$\\fid$": [Curve("_a$", (10, 20), (1.0, 2.0)), Curve("b", (10,), (1.5,))]})
    legend = pixels(content)[-40:]
    assert all((np.abs(legend - colour).sum(axis=2) < 12).any() for colour in (BLUE, ORANGE))


def test_a_sweep_has_a_panel_for_every_value():
    curve = Curve("model", (10, 25, 50), (Estimate(0.5, 0.4, 0.6), Estimate(0.6, 0.5, 0.7), Estimate(0.7, 0.6, 0.8)))
    sizes = [pixels(draw_sweep("steps", {f"v{n}": [curve] for n in range(number)})).shape[:2] for number in (1, 3, 4)]
    assert sizes[0][1] < sizes[1][1] == sizes[2][1] and sizes[0][0] == sizes[1][0] < sizes[2][0]
