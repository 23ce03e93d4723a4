"""From a decoded picture to the pixels of its bucket: a crop, in one pass of Lanczos or as ADM does it."""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from bitdance_scale.data.images.views import View, covered_px, cut, place

_FEW_MARGINS, _MANY_MARGINS = 3, 16
_SMALL_ERROR_PX = 0.02


class ResizeMethod(enum.StrEnum):
    """From what a picture is resized, and how."""

    SHARP = "sharp"
    """From the whole picture."""
    FAST = "fast"
    """From half its size, made with a box filter, if it is a JPEG at least twice as large as its bucket."""
    ADM = "adm"
    """From the whole picture: halved with a box filter while it is twice as large as needed, then bicubic."""


class Axis(NamedTuple):
    """One axis of a resize in whole source pixels, of which the middle of the result is used.

    Attributes:
        length_px: source pixels that are resized, around the centre; more than there are: the border is repeated.
        num_outputs: pixels that they become.
        margin: of these, how many are cut off at either end.
    """

    length_px: int
    num_outputs: int
    margin: int


def centre_region(size_px: tuple[int, int], bucket_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred region of an image that has the aspect of a bucket."""
    height, width = size_px
    scale = min(height / bucket_px[0], width / bucket_px[1])
    region_height, region_width = bucket_px[0] * scale, bucket_px[1] * scale
    left, top = max(0.0, (width - region_width) / 2), max(0.0, (height - region_height) / 2)
    return left, top, min(float(width), left + region_width), min(float(height), top + region_height)


def centred_axis(side_px: int, region_px: float, num_outputs: int) -> Axis:
    """How to resize the centred part of a side, whose ends may lie inside pixels, with a resize of whole pixels.

    A few pixels more than wanted are made at either end: as many as bring the ends of a whole number of source pixels
    to those of the region. So the filter also sees what lies beyond the region.

    Args:
        side_px: the side of the picture.
        region_px: the part of it that is wanted, in its middle; at most `side_px`.
        num_outputs: pixels that this part becomes.
    """
    if region_px > side_px - 1e-6:
        return Axis(side_px, num_outputs, 0)
    best, least = Axis(side_px, num_outputs, 0), np.inf
    for margin in range(_FEW_MARGINS, _MANY_MARGINS + 1):
        total = num_outputs + 2 * margin
        # Odd or even as the side is: only then are they in its middle.
        length = max(side_px + 2 * round((region_px * total / num_outputs - side_px) / 2), 2 - side_px % 2)
        error = abs(length * num_outputs / total - region_px) / 2
        if error < least:
            best, least = Axis(length, total, margin), error
        if least <= _SMALL_ERROR_PX:
            break
    return best


def resize_centre(pixels: np.ndarray, bucket_px: tuple[int, int]) -> np.ndarray:
    """Antialiased Lanczos resize of the largest centred region that has the aspect of a bucket.

    torch's kernel for bytes is written in vector instructions, runs in the thread that calls it and holds no lock of
    Python. It gives Pillow's pixels to within 2 of 255. A torch that has no Lanczos leaves the work to Pillow, which
    takes six times as long.

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

    height, width = pixels.shape[:2]
    box = centre_region((height, width), bucket_px)
    if not has_torch_lanczos():
        return resize_box(pixels, bucket_px, box)
    rows, columns = (
        centred_axis(side, stop - start, num_outputs)
        for side, start, stop, num_outputs in zip((height, width), box[1::-1], box[:1:-1], bucket_px, strict=True)
    )
    source = _middle(_middle(pixels, 0, rows.length_px), 1, columns.length_px)
    # torch warns of arrays that cannot be written, as Pillow's are.
    batch = torch.from_numpy(np.require(source, requirements=["C", "W"])).permute(2, 0, 1)[None]
    size = rows.num_outputs, columns.num_outputs
    planes = torch.nn.functional.interpolate(batch, size=size, mode="lanczos", antialias=True)[0].numpy()
    # torch's own copy would start a pool of threads for each thread that calls it.
    found = np.empty((*bucket_px, 3), np.uint8)
    top, left = rows.margin, columns.margin
    for channel, plane in enumerate(planes):
        found[..., channel] = plane[top : top + bucket_px[0], left : left + bucket_px[1]]
    return found


@functools.cache
def has_torch_lanczos() -> bool:
    """Whether the installed torch resizes with Lanczos, as 2.13 does."""
    import torch

    return hasattr(torch.ops.aten, "_upsample_lanczos2d_aa")


def resize_box(pixels: np.ndarray, bucket_px: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Pillow's antialiased Lanczos resize of a region whose borders may lie inside pixels.

    Args:
        pixels: uint8 [h, w, 3].
        bucket_px: (height, width) of the result.
        box: (left, top, right, bottom) of the region.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = bucket_px
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


def resize_view(pixels: np.ndarray, bucket_px: tuple[int, int], view: View) -> np.ndarray:
    """`resize_centre`, or Lanczos of the whole picture, of which a crop is cut.

    Args:
        pixels: uint8 [h, w, 3].
        bucket_px: (height, width) of the result.
        view: what is wanted; it is not mirrored here.

    Returns:
        uint8 [height, width, 3].
    """
    if view.crop is None:
        return resize_centre(pixels, bucket_px)
    placed = place(_size_px(pixels), bucket_px, view)
    return cut(resize_centre(pixels, placed.scaled_px), placed, bucket_px)


def resize_adm(pixels: np.ndarray, bucket_px: tuple[int, int], view: View) -> np.ndarray:
    """The resize that class-conditional networks on ImageNet are compared with; arguments as `resize_view`.

    The whole picture is halved with a box filter while it covers twice what it has to, then resized with antialiased
    bicubic to whole pixels, and the view is cut out. Pillow does the first; torch's kernel does the second three times
    as fast, to within 1 of 255. Source: guided-diffusion, as `views.place`.
    """
    import torch

    cover = covered_px(bucket_px, view)
    while min(side / covered for side, covered in zip(pixels.shape, cover, strict=False)) >= 2:
        half = pixels.shape[1] // 2, pixels.shape[0] // 2
        pixels = np.asarray(Image.fromarray(pixels).resize(half, Image.Resampling.BOX))
    placed = place(_size_px(pixels), bucket_px, view)
    if placed.scaled_px == pixels.shape[:2]:
        return np.ascontiguousarray(cut(pixels, placed, bucket_px))
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(batch, size=placed.scaled_px, mode="bicubic", antialias=True)[0].numpy()
    return np.ascontiguousarray(cut(planes.transpose(1, 2, 0), placed, bucket_px))


def _size_px(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _middle(pixels: np.ndarray, axis: int, length_px: int) -> np.ndarray:
    """The middle of an axis, with its border repeated if it is shorter."""
    start = (pixels.shape[axis] - length_px) // 2
    if start >= 0:
        return pixels[start : start + length_px] if axis == 0 else pixels[:, start : start + length_px]
    return np.pad(pixels, [(-start, -start) if a == axis else (0, 0) for a in range(3)], mode="edge")
