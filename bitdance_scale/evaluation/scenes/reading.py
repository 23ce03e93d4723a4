"""Reads a picture of a demo scene by classical image analysis: which shapes of which colours are where.

The background of a demo scene is one colour under a linear shade, so a plane per channel is fitted to the picture from
its border inwards; what differs much from it is foreground. Connected foreground of one palette colour is an object,
and its silhouette in its bounding box is compared with the eight shapes. No part of the model under test is involved.
What lies over the scene in a style of the demo (`style.py`) is read as background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from bitdance_scale.demo.scenes import BACKGROUNDS, COLORS, SHAPES, shape_mask
from bitdance_scale.evaluation.scenes.style import CHANNEL_WEIGHTS, style_mask

READ_SIDE_PX = 192
"""Shorter side at which pictures are read; smaller ones are enlarged, so that silhouettes have enough pixels."""
MASK_SIDE_PX = 48
MIN_AREA = 0.006
"""Smallest object, as a share of the picture; the smallest in the demo's scenes takes 0.012."""
MIN_OVERLAP = 0.72
"""Least intersection over union with its shape; a small star whose tips the tokenizer blunts reaches 0.73 to 0.8."""
MAX_STRETCH = 1.45
"""A silhouette stretched more than this against its shape is not that shape."""
MAX_COLOR_DISTANCE = 35.0
"""Furthest from a palette colour that a pixel is of that colour without doubt."""
MIN_PART = 0.12
"""Share of a connected region that a second colour must take to be an object of its own."""


@dataclass(frozen=True)
class SeenObject:
    """A shape found in a picture.

    Attributes:
        shape: one of `SHAPES`, or None for a silhouette that is none of them.
        color: the nearest of `COLORS`.
        centre: (x, y) of its bounding box as a share of width and height.
        extent: (width, height) of its bounding box as a share of width and height.
        overlap: intersection over union of its silhouette with the nearest shape, 0..1.
    """

    shape: str | None
    color: str
    centre: tuple[float, float]
    extent: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class SeenScene:
    """What a picture shows.

    Attributes:
        background: the nearest of `BACKGROUNDS`.
        objects: from the largest to the smallest.
        clutter: share of the foreground that belongs to no object with a shape, 0..1; 0 without foreground.
    """

    background: str
    objects: tuple[SeenObject, ...]
    clutter: float = 0.0


def read_scene(image: Image.Image) -> SeenScene:
    """Reads an RGB picture of any size."""
    rgb = np.asarray(_enlarged(image.convert("RGB")), dtype=np.float32)
    pixels, is_hidden = _weighted(rgb), style_mask(rgb)
    background = _background_plane(pixels, ~is_hidden)
    pixels[is_hidden] = background[is_hidden]
    palette = _weighted(np.array(list(COLORS.values()), dtype=np.float32))
    distance = np.linalg.norm(pixels - background, axis=-1)
    # Half-way between background and object is where an anti-aliased edge runs; each object has its own contrast, so a
    # low threshold finds the regions, and `_silhouette` draws their edge.
    regions, _ = ndimage.label(distance > 45.0)
    objects = []
    min_pixels = MIN_AREA * distance.size
    for number, box in enumerate(ndimage.find_objects(regions), 1):
        region = regions[box] == number
        if region.sum() < min_pixels:
            continue
        for color, part in _parts(region, pixels[box], palette):
            silhouette = _silhouette(part, distance[box])
            if silhouette.sum() >= min_pixels:
                objects.append((int(silhouette.sum()), _seen(silhouette, box, color, distance.shape)))
    grounds = _weighted(np.array(list(BACKGROUNDS.values()), dtype=np.float32))
    middle = background.reshape(-1, 3).mean(axis=0)
    name = list(BACKGROUNDS)[int(np.linalg.norm(grounds - middle, axis=-1).argmin())]
    objects.sort(key=lambda pair: -pair[0])
    foreground = int((regions > 0).sum())
    in_shapes = sum(area for area, item in objects if item.shape is not None)
    clutter = 1 - min(in_shapes / foreground, 1.0) if foreground else 0.0
    return SeenScene(name, tuple(item for _, item in objects), clutter)


def _enlarged(image: Image.Image) -> Image.Image:
    factor = READ_SIDE_PX / min(image.size)
    if factor <= 1:
        return image
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def _weighted(rgb: np.ndarray) -> np.ndarray:
    return rgb * CHANNEL_WEIGHTS


def _background_plane(pixels: np.ndarray, is_seen: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3], the shaded background under everything, from a robust fit of a plane per channel.

    Only pixels of `is_seen`, bool [H, W], count.
    """
    height, width, _ = pixels.shape
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    terms = np.stack([np.ones(x.size), x.ravel(), y.ravel()], axis=1)
    flat = pixels.reshape(-1, 3)
    rim = max(2, round(0.03 * min(height, width)))
    is_rim = np.ones((height, width), dtype=bool)
    is_rim[rim:-rim, rim:-rim] = False
    plane = np.broadcast_to(np.median(pixels[is_rim & is_seen], axis=0), flat.shape)
    for max_distance in (40.0, 25.0, 15.0):
        near = (np.linalg.norm(flat - plane, axis=1) < max_distance) & is_seen.ravel()
        if near.sum() < 0.05 * near.size:
            break
        plane = terms @ np.linalg.lstsq(terms[near], flat[near], rcond=None)[0]
    return plane.reshape(pixels.shape).astype(np.float32)


def _parts(region: np.ndarray, pixels: np.ndarray, palette: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Splits a connected region by palette colour; bool masks of the region's box."""
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    # Edges mix object and background and pass near other colours; what is of a colour counts, or the inside.
    counted = region & (distances.min(axis=-1) < MAX_COLOR_DISTANCE)
    if counted.sum() < 0.3 * region.sum():
        counted = ndimage.binary_erosion(region, iterations=2)
    if not counted.any():
        counted = region
    shares = np.bincount(distances.argmin(axis=-1)[counted], minlength=len(palette)) / counted.sum()
    colors = [int(index) for index in np.flatnonzero(shares >= MIN_PART)] or [int(shares.argmax())]
    if len(colors) == 1:
        return [(list(COLORS)[colors[0]], region)]
    owner = np.array(colors)[np.linalg.norm(pixels[:, :, None] - palette[colors], axis=-1).argmin(axis=-1)]
    parts = []
    for color in colors:
        labels, count = ndimage.label(ndimage.binary_opening(region & (owner == color)))
        parts += [(list(COLORS)[color], labels == number) for number in range(1, count + 1)]
    return parts


def _silhouette(part: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The part up to half of its own contrast with the background, its largest piece."""
    contrast = np.median(distance[part])
    labels, count = ndimage.label(part & (distance > 0.5 * contrast))
    if count == 0:
        return part
    return labels == 1 + int(ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1)).argmax())


def _seen(silhouette: np.ndarray, box: tuple[slice, slice], color: str, shape: tuple[int, int]) -> SeenObject:
    """The object of a silhouette inside `box` of a picture of `shape` (height, width)."""
    rows, columns = np.flatnonzero(silhouette.any(axis=1)), np.flatnonzero(silhouette.any(axis=0))
    tight = silhouette[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = box[0].start + rows[0], box[1].start + columns[0]
    height, width = tight.shape
    overlaps = {name: _overlap(tight, name) for name in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return SeenObject(
        best if overlaps[best] >= MIN_OVERLAP else None,
        color,
        ((left + width / 2) / shape[1], (top + height / 2) / shape[0]),
        (width / shape[1], height / shape[0]),
        overlaps[best],
    )


def _overlap(tight: np.ndarray, name: str) -> float:
    """Intersection over union of a tight silhouette and a shape, both filling a square; 0 if stretched too much."""
    template, aspect = _template(name)
    stretch = tight.shape[1] / tight.shape[0] / aspect
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        return 0.0
    side = (MASK_SIDE_PX, MASK_SIDE_PX)
    scaled = Image.fromarray(tight.astype(np.uint8) * 255).resize(side, Image.Resampling.BOX)
    mask = np.asarray(scaled, dtype=np.float32) / 255
    return float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())


@cache
def _template(name: str) -> tuple[np.ndarray, float]:
    """(float32 [MASK_SIDE_PX, MASK_SIDE_PX] coverage in its tight bounding box, width over height of that box)."""
    drawn = shape_mask(name, (480, 480))
    tight = drawn.point(lambda value: 255 * (value > 127)).getbbox()
    assert tight is not None, f"{name} has a shape"
    width, height = tight[2] - tight[0], tight[3] - tight[1]
    side = (MASK_SIDE_PX, MASK_SIDE_PX)
    coverage = np.asarray(drawn.crop(tight).resize(side, Image.Resampling.BOX), dtype=np.float32) / 255
    return coverage, width / height
