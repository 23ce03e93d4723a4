"""Sizes of images: those that the release samples at, and what other sizes are possible."""

from __future__ import annotations

import math

from bitdance_scale.config.data_rules import NUM_RESOLUTION_TOKENS
from bitdance_scale.config.schema import VisionSection
from bitdance_scale.errors import ConfigError

_LANDSCAPE = (
    *((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024)),
    *((256, 1024), (256, 896), (384, 640), (512, 512)),
)
PUBLISHED_SIZES: tuple[tuple[int, int], ...] = tuple(
    dict.fromkeys(size for height, width in _LANDSCAPE for size in ((height, width), (width, height)))
)
"""(height, width) in pixels at which the release samples: areas of about 1024 x 1024 and 512 x 512, and transposes."""
PUBLISHED_DOWNSAMPLE = 16
"""Pixels per cell of the published tokenizer, which these sizes are for."""


_SMALL_CELLS = (8, 16, 32)
"""Sides of square images of tokenizers other than the published one, in cells: what small models are trained at."""


def known_sizes(vision: VisionSection) -> list[tuple[int, int]]:
    """(height, width) in pixels of images to offer for a published folder, which does not say what it was trained at.

    Those of the release, by falling area, if the folder has its tokenizer; else squares of a few cells.
    """
    if vision.downsample == PUBLISHED_DOWNSAMPLE:
        return sorted(PUBLISHED_SIZES, key=lambda size: (-size[0] * size[1], size[0] != size[1]))
    sides = [cells for cells in _SMALL_CELLS if cells % vision.block_side == 0] or [vision.block_side]
    return [(cells * vision.downsample, cells * vision.downsample) for cells in sides]


def check_size(height: int, width: int, vision: VisionSection) -> tuple[int, int]:
    """The latent grid (height, width) of an image.

    Args:
        height: in pixels.
        width: in pixels.
        vision: pixels per cell and the block side.

    Raises:
        ConfigError: a side is not a positive multiple of downsample * block side, or has more cells than there are
            resolution tokens; names sizes that are possible.
    """
    multiple = vision.downsample * vision.block_side
    largest = NUM_RESOLUTION_TOKENS * vision.downsample // multiple * multiple
    if all(isinstance(side, int) and 0 < side <= largest and side % multiple == 0 for side in (height, width)):
        return height // vision.downsample, width // vision.downsample
    raise ConfigError(
        f"height = {height}, width = {width}: both must be multiples of {multiple} px ({vision.downsample} px a cell, "
        f"blocks of {vision.block_side} x {vision.block_side} cells) from {multiple} to {largest} px; "
        f"use {_nearest_sizes(height, width, multiple, largest, vision.downsample)}"
    )


def beyond_published(height: int, width: int, vision: VisionSection) -> str:
    """One line for the user if the release does not sample at this size; empty if it does."""
    if vision.downsample != PUBLISHED_DOWNSAMPLE or (height, width) in PUBLISHED_SIZES:
        return ""
    return (
        f"{height} x {width} px is not among the sizes that the release samples at; expect worse images than at "
        f"{_published_near(height, width)}"
    )


def _nearest_sizes(height: int, width: int, multiple: int, largest: int, downsample: int) -> str:
    if downsample == PUBLISHED_DOWNSAMPLE:
        return _published_near(height, width)
    sides = (min(largest, max(multiple, round(side / multiple) * multiple)) for side in (height, width))
    return "height {}, width {}".format(*sides)


def _published_near(height: int, width: int) -> str:
    """The two published sizes whose sides are closest in ratio."""
    height, width = max(1, height), max(1, width)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / height)) + abs(math.log(size[1] / width))

    return " or ".join(f"{h} x {w}" for h, w in sorted(PUBLISHED_SIZES, key=distance)[:2])
