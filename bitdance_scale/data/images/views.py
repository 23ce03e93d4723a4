"""Which part of a picture becomes an image, and whether it is mirrored: the centre, or a crop at a random place."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Crop(NamedTuple):
    """A crop of the size of the bucket, out of the picture scaled to cover it once or a little more.

    Attributes:
        max_zoom: the short side of the bucket is enlarged to a whole number of pixels up to this many times, rounded
            up; the picture is scaled to cover a bucket that is larger by as much.
        zoom: in [0, 1), which of these numbers, all equally likely.
        top, left: in [0, 1), which of the places of the crop in the scaled picture, likewise.
    """

    max_zoom: float
    zoom: float
    top: float
    left: float


class View(NamedTuple):
    """One view of a picture.

    Attributes:
        is_flipped: whether left and right are exchanged.
        crop: where it is cut out; None: the centre of the picture.
    """

    is_flipped: bool = False
    crop: Crop | None = None


CENTRE = View()
"""The centre as it is: what is trained without augmentation, and what is evaluated."""


class Placement(NamedTuple):
    """Where a view lies.

    Attributes:
        scaled_px: (height, width) to which the whole picture is scaled.
        top, left: first row and column of the bucket in that.
    """

    scaled_px: tuple[int, int]
    top: int
    left: int


def covered_px(bucket_px: tuple[int, int], view: View) -> tuple[float, float]:
    """(height, width) that the scaled picture has to cover: that of the bucket, or more for a crop out of it."""
    if view.crop is None:
        return bucket_px
    short = min(bucket_px)
    target = short + int(view.crop.zoom * (math.ceil(short * view.crop.max_zoom) - short + 1))
    return bucket_px[0] * target / short, bucket_px[1] * target / short


def place(size_px: tuple[int, int], bucket_px: tuple[int, int], view: View) -> Placement:
    """Where a view lies in a picture scaled as a whole, by whole pixels, as guided-diffusion does it.

    Source: `center_crop_arr` and `random_crop_arr` of the published ADM (arXiv 2105.05233), for any bucket.
    """
    covered = covered_px(bucket_px, view)
    scale = max(cover / side for cover, side in zip(covered, size_px, strict=True))
    height, width = (max(bucket, round(side * scale)) for side, bucket in zip(size_px, bucket_px, strict=True))
    room = height - bucket_px[0], width - bucket_px[1]
    if view.crop is None:
        return Placement((height, width), room[0] // 2, room[1] // 2)
    return Placement((height, width), int(view.crop.top * (room[0] + 1)), int(view.crop.left * (room[1] + 1)))


def cut(pixels: np.ndarray, placed: Placement, bucket_px: tuple[int, int]) -> np.ndarray:
    """The view [height, width, 3] of a picture [h, w, 3] scaled to `placed.scaled_px`."""
    return pixels[placed.top : placed.top + bucket_px[0], placed.left : placed.left + bucket_px[1]]


def source_box(
    size_px: tuple[int, int], bucket_px: tuple[int, int], placed: Placement
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a view in pixels of the picture before it is scaled."""
    down, across = (side / scaled for side, scaled in zip(size_px, placed.scaled_px, strict=True))
    bottom, right = placed.top + bucket_px[0], placed.left + bucket_px[1]
    return placed.left * across, placed.top * down, right * across, bottom * down
