"""Geometry and filter of the resize, against Pillow's resize of a region with borders inside pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.images import resize
from bitdance_scale.data.images.resize import (
    centre_region,
    centred_axis,
    has_torch_lanczos,
    resize_adm,
    resize_box,
    resize_centre,
    resize_view,
)
from bitdance_scale.data.images.views import CENTRE, Crop, View

SIZES_PX = [
    ((40, 60), (20, 20)),
    ((41, 60), (20, 20)),
    ((60, 41), (16, 10)),
    ((63, 64), (30, 30)),
    ((33, 50), (48, 48)),
]


@pytest.mark.parametrize(("size_px", "bucket_px"), SIZES_PX)
def test_places_are_right_to_half_a_pixel_and_unbiased(size_px: tuple[int, int], bucket_px: tuple[int, int]) -> None:
    """A slope says where each pixel of the result was in the source."""
    left, top, right, bottom = centre_region(size_px, bucket_px)
    for axis, start, stop in ((0, top, bottom), (1, left, right)):
        slope = np.arange(size_px[axis]) * 3
        pixels = np.stack([np.moveaxis(np.broadcast_to(slope, (size_px[1 - axis], size_px[axis])), -1, axis)] * 3, -1)
        places = resize_centre(pixels.astype(np.uint8), bucket_px).mean(axis=(1 - axis, 2)) / 3
        scale = (stop - start) / bucket_px[axis]
        # Where the filter reaches over the edge of the picture, it weighs one side only.
        off = (places - (start + (np.arange(bucket_px[axis]) + 0.5) * scale - 0.5))[3:-3]
        # A level is a third of a pixel, so places are rounded to a sixth, halves always up.
        assert np.abs(off).max() <= 0.5 + 1 / 6 and abs(off.mean()) <= 1 / 6 + 1e-6


def test_ends_of_the_region_are_off_by_half_a_pixel_at_most() -> None:
    """And in most cases by far less."""
    numbers = np.random.default_rng(0)
    errors = []
    for _ in range(2000):
        side, num_outputs = int(numbers.integers(2, 2000)), int(numbers.integers(1, 600))
        # A region of less than two pixels cannot have fewer than one or two whole ones.
        region = float(numbers.uniform(2, side))
        axis = centred_axis(side, region, num_outputs)
        assert (axis.length_px - side) % 2 == 0 and axis.num_outputs == num_outputs + 2 * axis.margin
        errors.append(abs(axis.length_px * num_outputs / axis.num_outputs - region) / 2)
    assert max(errors) <= 0.5 and np.median(errors) < 0.03 and np.percentile(errors, 90) < 0.1


@pytest.mark.parametrize("bucket_px", [(64, 64), (96, 64), (150, 150), (32, 96)])
def test_pixels_are_pillows_where_borders_are_whole(bucket_px: tuple[int, int]) -> None:
    """Both kernels round their weights, and once between the axes."""
    if not has_torch_lanczos():
        pytest.skip("this torch has no Lanczos")
    numbers = np.random.default_rng(0)
    pixels = numbers.integers(0, 256, (96 * bucket_px[0] // 32, 96 * bucket_px[1] // 32, 3), dtype=np.uint8)
    for part in (pixels, np.pad(pixels, ((0, 0), (20, 20), (0, 0)), mode="reflect")):
        found = resize_centre(part, bucket_px)
        expected = resize_box(part, bucket_px, centre_region(part.shape[:2], bucket_px))
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 2 and difference.mean() < 0.05


def test_without_torchs_lanczos_pillow_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    found = resize_centre(pixels, (35, 35))
    monkeypatch.setattr(resize, "has_torch_lanczos", lambda: False)
    assert np.array_equal(resize_centre(pixels, (35, 35)), resize_box(pixels, (35, 35), (10, 0, 80, 70)))
    assert np.abs(resize_centre(pixels, (35, 35)).astype(int) - found).max() <= 2


def adm(pixels: np.ndarray, side: int, short: int, place: tuple[float, float] | None) -> np.ndarray:
    """guided-diffusion's `random_crop_arr` with the place of the crop as shares, or its `center_crop_arr`."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * short:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    width, height = image.size
    y, x = (height - side) // 2, (width - side) // 2
    if place is not None:
        y, x = int(place[0] * (height - side + 1)), int(place[1] * (width - side + 1))
    return np.asarray(image)[y : y + side, x : x + side]


@pytest.mark.parametrize("size_px", [(64, 64), (83, 111), (131, 128), (300, 259), (263, 521), (50, 61)])
def test_adm_is_what_pillow_makes_of_it(size_px: tuple[int, int]) -> None:
    """Noise, where neighbouring filters differ most; sides that are odd when they are halved; an enlarged one."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size_px, 3), dtype=np.uint8)
    assert np.abs(resize_adm(pixels, (64, 64), CENTRE).astype(int) - adm(pixels, 64, 64, None)).max() <= 1
    for number, place in ((0.0, (0.0, 0.0)), (0.5, (0.99, 0.3)), (0.999, (0.6, 0.999))):
        found = resize_adm(pixels, (64, 64), View(crop=Crop(1.25, number, *place)))
        expected = adm(pixels, 64, 64 + int(number * 17), place)
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("resized", [resize_view, resize_adm])
@pytest.mark.parametrize("bucket_px", [(32, 32), (24, 48), (48, 24)])
def test_crops_reach_every_edge_at_every_zoom(resized, bucket_px: tuple[int, int]) -> None:
    """A slope each way says which part of the picture a crop shows: its size is that of the zoom, in any bucket."""
    rows, columns = np.indices((120, 160))
    pixels = np.stack([rows * 2, columns, rows * 0], axis=-1).astype(np.uint8)
    scale = max(bucket_px[0] / 120, bucket_px[1] / 160)
    short = min(bucket_px)
    for zoom in (0.0, 0.5, 0.9999):
        target = short + int(zoom * (short // 4 + 1))
        shown = [bucket / (scale * target / short) for bucket in bucket_px]
        corners = {}
        for top, left in ((0.0, 0.0), (0.9999, 0.9999)):
            found = resized(pixels, bucket_px, View(crop=Crop(1.25, zoom, top, left))).astype(float)
            assert found.shape == (*bucket_px, 3)
            corners[top] = found[..., 0].mean() / 2, found[..., 1].mean()
        for axis, side in enumerate((120, 160)):
            # The mean of a slope is the middle of the part shown; edges and rounding cost about a pixel.
            assert corners[0.0][axis] == pytest.approx(shown[axis] / 2 - 0.5, abs=2.0)
            assert corners[0.9999][axis] == pytest.approx(side - shown[axis] / 2 - 0.5, abs=2.0)


def test_a_thread_that_resizes_starts_no_others() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    resize_centre(pixels, (300, 300))
    resize_adm(pixels, (128, 128), CENTRE)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        before = os.listdir("/proc/self/task")
        pool.submit(resize_centre, pixels, (300, 300)).result()
        pool.submit(resize_adm, pixels, (128, 128), CENTRE).result()
        assert os.listdir("/proc/self/task") == before


def test_decoding_is_imported_without_torch() -> None:
    """Commands that only index data start at once."""
    code = "import sys; import bitdance_scale.data.image_decode; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
