"""From a decoded picture to the pixels of its bucket: crop and resize in one pass."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
from PIL import Image


class ResizeMethod(enum.StrEnum):
    """How a picture is resized."""

    SHARP = "sharp"
    """Antialiased bicubic from the whole picture, at every ratio."""
    FAST = "fast"
    """Lanczos; a JPEG at least twice as large as its bucket is first decoded at half its size, with a box filter."""


class Region(NamedTuple):
    """A part of a picture, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def centre_region(size_px: tuple[int, int], bucket_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred region of an image that has the aspect of a bucket."""
    height, width = size_px
    scale = min(height / bucket_px[0], width / bucket_px[1])
    region_height, region_width = bucket_px[0] * scale, bucket_px[1] * scale
    left, top = max(0.0, (width - region_width) / 2), max(0.0, (height - region_height) / 2)
    return left, top, min(float(width), left + region_width), min(float(height), top + region_height)


def whole_pixel_region(size_px: tuple[int, int], bucket_px: tuple[int, int]) -> Region:
    """`centre_region` in whole pixels.

    Each side differs from the exact one by less than a pixel and is odd or even as the side of the picture is. So the
    centre is exact, and no border is off by more than half a pixel.
    """
    left, top, right, bottom = centre_region(size_px, bucket_px)
    height, width = _like(bottom - top, size_px[0]), _like(right - left, size_px[1])
    return Region((size_px[0] - height) // 2, (size_px[1] - width) // 2, height, width)


def _like(side: float, whole: int) -> int:
    """The nearest length from 1 to `whole` that differs from it by an even number."""
    return max(whole - 2 * round((whole - side) / 2), 2 - whole % 2)


def resize_sharp(pixels: np.ndarray, bucket_px: tuple[int, int]) -> np.ndarray:
    """Antialiased bicubic resize, with the filter of Pillow's `BICUBIC` (a = -0.5).

    torch's kernel for bytes is written in vector instructions; it uses one thread and holds no lock of Python.

    Args:
        pixels: uint8 [h, w, 3].
        bucket_px: (height, width) of the result.

    Returns:
        uint8 [height, width, 3].
    """
    if pixels.shape[:2] == bucket_px:
        return np.ascontiguousarray(pixels)
    # What only indexes data should not wait for torch.
    import torch

    # torch warns of arrays that cannot be written, as Pillow's are.
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(batch, size=bucket_px, mode="bicubic", antialias=True)[0].numpy()
    # torch's own copy would start a pool of threads for each thread that calls it.
    found = np.empty((*bucket_px, 3), np.uint8)
    for channel, plane in enumerate(planes):
        found[..., channel] = plane
    return found


def resize_lanczos(
    pixels: np.ndarray, bucket_px: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """Antialiased Lanczos resize of a region whose borders may lie inside pixels.

    Args:
        pixels: uint8 [h, w, 3].
        bucket_px: (height, width) of the result.
        box: (left, top, right, bottom) of the region.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = bucket_px
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))
