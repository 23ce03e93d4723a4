"""Bucket assignment, and selection from the bitmap of eligible samples."""

from __future__ import annotations

import numpy as np
import pytest

from bitdance_scale.config.schema import Resolution
from bitdance_scale.data.plan.buckets import EligibleSamples, assign_buckets, resolution_buckets

# Sec. 4.3, the sizes of about 1024 x 1024 pixels.
RELEASE = ((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024))
CLASS = Resolution(side_px=1024, share=1, buckets_px=RELEASE)


def assigned(height: int, width: int, max_upscale: float = 1.0) -> tuple[int, int] | None:
    buckets = resolution_buckets(CLASS)
    row = assign_buckets(np.array([height]), np.array([width]), buckets, max_upscale)[0]
    return None if row < 0 else tuple(buckets[row].tolist())


def test_transposes_are_added_once() -> None:
    buckets = resolution_buckets(CLASS).tolist()
    assert len(buckets) == 11
    assert [2048, 512] in buckets and buckets.count([1024, 1024]) == 1


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2000, 1300), (1280, 768)),
        ((1300, 2000), (768, 1280)),
        ((600, 2400), (512, 2048)),
        # Nearest in aspect would be the square; it would be enlarged.
        ((1000, 1160), (896, 1152)),
        ((1023, 1023), None),
        ((511, 9000), None),
        # More pixels than are ever decoded.
        ((8193, 8192), None),
    ],
)
def test_nearest_aspect_without_enlarging(size: tuple[int, int], bucket: tuple[int, int] | None) -> None:
    assert assigned(*size) == bucket


def test_max_upscale_admits_smaller_images() -> None:
    assert assigned(512, 512, max_upscale=2.0) == (1024, 1024)
    assert assigned(511, 511, max_upscale=2.0) is None


def test_agrees_with_logarithms_one_by_one() -> None:
    numbers = np.random.default_rng(0)
    heights, widths = numbers.integers(300, 3000, (2, 500))
    buckets = resolution_buckets(CLASS)
    rows = assign_buckets(heights, widths, buckets, 1.25)
    for height, width, row in zip(heights.tolist(), widths.tolist(), rows.tolist(), strict=True):
        fitting = [i for i, (h, w) in enumerate(buckets.tolist()) if max(h / height, w / width) <= 1.25]
        assert (row >= 0) == bool(fitting)
        if fitting:
            distances = {i: abs(np.log(buckets[i, 1] / buckets[i, 0]) - np.log(width / height)) for i in fitting}
            # Equal aspects differ by rounding between the two formulas, not more.
            assert row in fitting and distances[row] <= min(distances.values()) + 1e-12


def eligible_squares(sides: np.ndarray) -> EligibleSamples:
    buckets = resolution_buckets(CLASS)
    return EligibleSamples(len(sides), lambda part: assign_buckets(sides[part], sides[part], buckets, 1.0) >= 0)


@pytest.mark.parametrize("num_samples", [1, 511, 512, 513, 3000])
def test_selects_the_eligible_in_order(num_samples: int) -> None:
    sides = np.random.default_rng(num_samples).choice([900, 1100], num_samples, p=[0.7, 0.3])
    sides[-1] = 1100
    eligible = eligible_squares(sides)
    expected = np.flatnonzero(sides >= 1024)
    assert len(eligible) == len(expected)
    assert np.array_equal(eligible.select(np.arange(len(expected))), expected)
    assert np.array_equal(eligible.select(np.arange(len(expected))[::-1]), expected[::-1])


def test_gaps_of_many_groups_are_skipped() -> None:
    sides = np.full(5000, 900)
    sides[[3, 4000, 4999]] = 1100
    eligible = eligible_squares(sides)
    assert eligible.select(np.array([0, 1, 2])).tolist() == [3, 4000, 4999]
