"""From the bytes of an image file to the pixels of its bucket.

Decoding is strict: an image that is cut, damaged or not of the indexed size is a sample error, never a half-grey
picture. EXIF orientation is applied, colours become sRGB, transparency is laid over white, and an animation gives its
first frame. What is done for each format is in `images/`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.images import jpeg, webp
from bitdance_scale.data.images.colour import to_srgb
from bitdance_scale.data.images.flatten import over_white, png_pixels
from bitdance_scale.data.images.header import Header, ImageFormat, sniff
from bitdance_scale.data.images.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, bad_image, too_expensive
from bitdance_scale.data.images.png import parse as parse_png
from bitdance_scale.data.images.resize import (
    ResizeMethod,
    centre_region,
    resize_adm,
    resize_box,
    resize_view,
)
from bitdance_scale.data.images.views import CENTRE, View, place, source_box

DECODE_VERSION = 2
"""Changes whenever the same file would give other pixels."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) of a region, in pixels."""


def read_size_px(data: bytes) -> tuple[int, int]:
    """(height, width) of an image after its EXIF orientation, from its header alone.

    The first 64 KiB of a file suffice, but for a WebP with EXIF, and for a JPEG with more metadata than that.

    Raises:
        SampleError: the bytes are not an image, or it has more than `MAX_IMAGE_PIXELS`.
    """
    return _header(data).upright_px


def decode_image(
    data: bytes,
    stored_px: tuple[int, int],
    bucket_px: tuple[int, int],
    content_px: tuple[int, int] | None = None,
    resize: str = ResizeMethod.SHARP,
    view: View = CENTRE,
) -> np.ndarray:
    """Decodes an image, resizes it to cover the bucket and crops the centre, or whatever the view is.

    This is one antialiased Lanczos pass over the region; for the centre that is the largest centred one that has the
    aspect of the bucket. "fast" first decodes a JPEG that is at least twice as large at half its size. On photographs
    that costs several decibels (docs/benchmarks.md). "adm" resizes as guided-diffusion does (`resize_adm`), from the
    whole picture: a JPEG that is decoded at half its size is not one halved with a box filter.

    Args:
        data: a JPEG, PNG or WebP file.
        stored_px: (height, width) that the index has for it: of the upright picture, or as its header has it before
            the EXIF orientation, which img2dataset writes when it keeps the original bytes.
        bucket_px: (height, width) of the result.
        content_px: (height, width) of the picture in the middle of the image, if the rest is border; None: no border.
        resize: a `ResizeMethod`.
        view: which part of the picture.

    Returns:
        uint8 [height, width, 3], sRGB.

    Raises:
        SampleError: the file is damaged, too large, of an unsupported kind or not of the indexed size.
    """
    return decode_views(data, stored_px, bucket_px, content_px, resize, (view,))[0]


def decode_views(
    data: bytes,
    stored_px: tuple[int, int],
    bucket_px: tuple[int, int],
    content_px: tuple[int, int] | None,
    resize: str,
    views: Sequence[View],
) -> list[np.ndarray]:
    """Several views of an image that is decoded once; otherwise as `decode_image`."""
    header = _header(data)
    if stored_px not in (header.upright_px, header.stored_px):
        detail = f"the image is {header.upright_px} pixels, its index entry says {stored_px}"
        raise SampleError(ErrorCause.SIZE_MISMATCH, detail)
    size_px, content = header.upright_px, content_px or stored_px
    if stored_px != size_px:
        content = content[::-1]
    content = min(content[0], size_px[0]), min(content[1], size_px[1])
    # The border above and to the left of the picture; img2dataset puts the smaller half of an odd border there.
    top, left = ((size - side) // 2 for size, side in zip(size_px, content, strict=True))
    method = ResizeMethod(resize)

    @functools.cache
    def decoded(is_half_size: bool) -> tuple[np.ndarray, bytes | None]:
        pixels, profile = _decode(data, header, is_half_size)
        return _upright(pixels, header.orientation), profile

    found = []
    for view in views:
        if method == ResizeMethod.FAST:
            box = _view_box(content, bucket_px, view)
            box = box[0] + left, box[1] + top, box[2] + left, box[3] + top
            is_half = header.format == ImageFormat.JPEG and header.orientation == 1 and _covers_twice(box, bucket_px)
            if is_half:
                # An odd side is rounded up, but in pixels of the half-size image the region is exactly halved.
                box = box[0] / 2, box[1] / 2, box[2] / 2, box[3] / 2
            pixels, profile = decoded(is_half)
            pixels = resize_box(pixels, bucket_px, box)
        else:
            pixels, profile = decoded(False)
            resized = resize_adm if method == ResizeMethod.ADM else resize_view
            pixels = resized(pixels[top : top + content[0], left : left + content[1]], bucket_px, view)
        pixels = _in_srgb(pixels, profile)
        found.append(np.ascontiguousarray(pixels[:, ::-1] if view.is_flipped else pixels))
    return found


def _header(data: bytes) -> Header:
    header = sniff(data)
    if header is None:
        raise bad_image(f"not a JPEG, PNG or WebP ({len(data)} bytes), or its header is damaged")
    height, width = header.stored_px
    if height * width > MAX_IMAGE_PIXELS:
        raise SampleError(ErrorCause.TOO_MANY_PIXELS, f"{height} x {width} pixels, the limit is {MAX_IMAGE_PIXELS}")
    return header


def _decode(data: bytes, header: Header, is_half_size: bool = False) -> tuple[np.ndarray, bytes | None]:
    """uint8 [h, w, 3], the picture as stored, over white; and the profile of its RGB, None for sRGB.

    The profile of an RGB JPEG is left for after the resize, which usually leaves far fewer pixels to convert.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise too_expensive(f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    if header.format == ImageFormat.JPEG:
        file = jpeg.parse(data)
        samples = jpeg.decode(file, is_half_size, header.stored_px)
        height, width, num_samples = samples.shape
        if num_samples == 3:
            return samples, file.profile
        mode = {1: "L", 4: "CMYK"}[num_samples]
        image = Image.frombuffer(mode, (width, height), samples, "raw", mode, 0, 1)
        return np.asarray(to_srgb(image, file.profile)), None
    if header.format == ImageFormat.PNG:
        return png_pixels(parse_png(data)), None
    image, profile = webp.decode(data)
    opacity = image.getchannel("A") if image.mode == "RGBA" else None
    return over_white(to_srgb(image.convert("RGB"), profile), opacity), None


def _in_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    return pixels if profile is None else np.asarray(to_srgb(Image.fromarray(pixels), profile))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of [h, w, 3] with the EXIF orientation applied."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # What is left to do after 5 to 8 have exchanged rows and columns.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _view_box(size_px: tuple[int, int], bucket_px: tuple[int, int], view: View) -> Box:
    """The region of a picture that a view shows."""
    if view.crop is None:
        return centre_region(size_px, bucket_px)
    return source_box(size_px, bucket_px, place(size_px, bucket_px, view))


def _covers_twice(box: Box, bucket_px: tuple[int, int]) -> bool:
    left, top, right, bottom = box
    return min((bottom - top) / bucket_px[0], (right - left) / bucket_px[1]) >= 2
