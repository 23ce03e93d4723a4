"""The bucket of an image, selection from the bitmap of eligible samples, and the picture inside a border."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.plan.buckets import (
    EligibleSamples,
    Staircase,
    assign_buckets,
    content_px,
    resolution_buckets,
)
from tests.unit.data.small_data import bare_index

# Sec. 4.3, the sizes of about 1024 x 1024 pixels.
RELEASE = ((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024))
RESOLUTION = Resolution(side_px=1024, share=1, buckets_px=RELEASE)


def assigned(height: int, width: int, max_upscale: float = 1.0) -> tuple[int, int] | None:
    buckets = resolution_buckets(RESOLUTION)
    row = assign_buckets(np.array([height]), np.array([width]), buckets, max_upscale)[0]
    return None if row < 0 else tuple(buckets[row].tolist())


def test_transposes_are_added_once() -> None:
    buckets = resolution_buckets(RESOLUTION).tolist()
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
    buckets = resolution_buckets(RESOLUTION)
    rows = assign_buckets(heights, widths, buckets, 1.25)
    for height, width, row in zip(heights.tolist(), widths.tolist(), rows.tolist(), strict=True):
        fitting = [i for i, (h, w) in enumerate(buckets.tolist()) if max(h / height, w / width) <= 1.25]
        assert (row >= 0) == bool(fitting)
        if fitting:
            distances = {i: abs(np.log(buckets[i, 1] / buckets[i, 0]) - np.log(width / height)) for i in fitting}
            # Equal aspects differ by rounding between the two formulas, not more.
            assert row in fitting and distances[row] <= min(distances.values()) + 1e-12


@pytest.mark.parametrize("max_upscale", [1.0, 1.1, 1.25, 2.0, 1 / 3 + 1])
@pytest.mark.parametrize("buckets_px", [RELEASE, ((256, 256),), ((16, 16), (24, 8)), ((100, 7), (9, 90), (70, 70))])
def test_a_staircase_covers_what_gets_a_bucket(buckets_px: tuple[tuple[int, int], ...], max_upscale: float) -> None:
    """Also next to every corner, and above the largest number of pixels."""
    buckets = resolution_buckets(dataclasses.replace(RESOLUTION, buckets_px=buckets_px))
    numbers = np.random.default_rng(0)
    near = [int(side / max_upscale) + shift for side in np.unique(buckets) for shift in (-1, 0, 1, 2)]
    sides = np.array([*near, 1, 8191, 8192, 8193, 65535, *numbers.integers(1, 3000, 30)])
    heights, widths = (grid.ravel() for grid in np.meshgrid(sides, sides))
    expected = assign_buckets(heights, widths, buckets, max_upscale) >= 0
    found = Staircase(buckets, max_upscale).covers(heights.astype(np.uint16), widths.astype(np.uint16))
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(found, expected)


def eligible_squares(sides: np.ndarray) -> EligibleSamples:
    return EligibleSamples.of_bits(np.packbits(sides >= 1024))


@pytest.mark.parametrize("num_samples", [1, 511, 512, 513, 3000])
def test_selects_the_eligible_in_order(num_samples: int) -> None:
    sides = np.random.default_rng(num_samples).choice([900, 1100], num_samples, p=[0.7, 0.3])
    sides[-1] = 1100
    eligible = eligible_squares(sides)
    expected = np.flatnonzero(sides >= 1024)
    assert len(eligible) == len(expected)
    assert np.array_equal(eligible.select(np.arange(len(expected))), expected)
    assert np.array_equal(eligible.select(np.arange(len(expected))[::-1]), expected[::-1])
    assert np.array_equal(eligible.contains(np.arange(num_samples)), sides >= 1024)


def test_gaps_of_many_groups_are_skipped() -> None:
    sides = np.full(5000, 900)
    sides[[3, 4000, 4999]] = 1100
    eligible = eligible_squares(sides)
    assert eligible.select(np.array([0, 1, 2])).tolist() == [3, 4000, 4999]


def pad_as_img2dataset(picture: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The image scaled to the side and padded with white, more below and right; and the box of the picture."""
    scale = side / max(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    left, top = (side - width) // 2, (side - height) // 2
    padded = Image.new("RGB", (side, side), (255, 255, 255))
    padded.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return padded, (left, top, left + width, top + height)


@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([64, 255, 256]))
def test_the_picture_is_found_inside_its_border(height: int, width: int, side: int) -> None:
    _, box = pad_as_img2dataset(Image.new("RGB", (width, height)), side)
    index = bare_index(np.array([side]), np.array([side]), originals_px=np.array([[height, width]]))
    found = tuple(content_px(index, slice(0, 1), True)[0].tolist())
    expected = []
    for low, high in ((box[1], box[3]), (box[0], box[2])):
        expected.append(high - low if high - low == side else max(1, high - low - 2))
    assert found == tuple(expected)
    assert content_px(index, slice(0, 1), False).tolist() == [[side, side]]


@pytest.mark.parametrize("size_px", [(300, 200), (200, 301), (333, 100)])
def test_no_border_is_left_in_a_decoded_image(size_px: tuple[int, int]) -> None:
    height, width = size_px
    black = Image.new("RGB", (width, height))
    padded, _ = pad_as_img2dataset(black, 256)
    file = io.BytesIO()
    padded.save(file, "JPEG", quality=95)
    index = bare_index(np.array([256]), np.array([256]), originals_px=np.array([size_px]))
    content = tuple(content_px(index, slice(0, 1), True)[0].tolist())
    bucket = (64, 48) if height > width else (48, 64)
    assert decode_image(file.getvalue(), (256, 256), bucket, content).max() < 60
    assert decode_image(file.getvalue(), (256, 256), bucket).max() > 200
