"""From the bytes of an image file to the pixels of its bucket.

Decoding is strict: an image that is cut, damaged or not of the indexed size is a sample error, never a half-grey
picture. EXIF orientation is applied, transparency is laid over white, and an animation gives its first frame.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitdance_scale.data.data_errors import ErrorCause, SampleError

DECODE_VERSION = 1
"""Changes whenever the same file would give other pixels."""
# 8192 x 8192: 200 MB decoded, more than any bucket can use. A header that claims more is refused before decoding.
MAX_IMAGE_PIXELS = 1 << 26
MAX_IMAGE_BYTES = 1 << 28
"""A longer file is refused before it is read: it holds more bytes than 2^26 raw pixels."""

# Pillow loads its plugins when they are first needed, and two threads would race to do so.
Image.init()

_EXIF_ORIENTATION = 0x0112
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_DIRECT_MODES = ("RGB", "L", "CMYK", "YCbCr", "1")
_SCALED_MODES = ("RGB", "L")
_ALPHA_MODES = ("RGBA", "LA", "PA", "P")
_DEEP_GRAY_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def read_size_px(data: bytes) -> tuple[int, int]:
    """(height, width) of an image after its EXIF orientation, from its header alone.

    Raises:
        SampleError: the bytes are not an image, or it has more than `MAX_IMAGE_PIXELS`.
    """
    with _open(data) as image:
        return _upright_size_px(image)


def decode_image(
    data: bytes, stored_px: tuple[int, int], bucket_px: tuple[int, int], content_px: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes an image, resizes it to cover the bucket and crops the centre.

    This is one Lanczos pass with antialiasing over the centred region that has the aspect of the bucket. A JPEG that is
    at least twice as large is decoded at half its size, which is four times as fast and costs less than 1 dB. Decoding
    at a quarter would cost more, however much is left to resize (docs/benchmarks.md).

    Args:
        data: a JPEG, PNG or WebP file.
        stored_px: (height, width) that the index has for it.
        bucket_px: (height, width) of the result.
        content_px: (height, width) of the picture in the middle of the image, if the rest is border; None: no border.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        SampleError: the file is damaged, too large or not of the indexed size.
    """
    with _open(data) as image:
        orientation = _orientation(image)
        size_px = _upright_size_px(image)
        if size_px != stored_px:
            detail = f"the image is {size_px} pixels, its index entry says {stored_px}"
            raise SampleError(ErrorCause.SIZE_MISMATCH, detail)
        region = _region(size_px, bucket_px, content_px or size_px)
        try:
            is_plain = image.format == "JPEG" and image.mode in _SCALED_MODES and orientation not in _UPRIGHT
            if is_plain and _covers_twice(region, bucket_px):
                whole_px = image.size
                image.draft(image.mode, (image.width // 2, image.height // 2))
                if image.size != whole_px:
                    # An odd side is rounded up, but in pixels of the half-size image the region is exactly halved.
                    left, top, right, bottom = region
                    region = (left / 2, top / 2, right / 2, bottom / 2)
            image.load()
        except Exception as error:  # On damaged bytes Pillow's plugins raise nearly anything.
            raise SampleError(ErrorCause.BAD_IMAGE, f"{type(error).__name__}: {error}") from error
        pixels = _to_rgb(image)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    height, width = bucket_px
    return np.asarray(pixels.resize((width, height), Image.Resampling.LANCZOS, box=region))


def centre_region(size_px: tuple[int, int], bucket_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred region of an image that has the aspect of a bucket."""
    height, width = size_px
    scale = min(height / bucket_px[0], width / bucket_px[1])
    region_height, region_width = bucket_px[0] * scale, bucket_px[1] * scale
    left, top = max(0.0, (width - region_width) / 2), max(0.0, (height - region_height) / 2)
    return left, top, min(float(width), left + region_width), min(float(height), top + region_height)


def _region(
    size_px: tuple[int, int], bucket_px: tuple[int, int], content_px: tuple[int, int]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the centre of the picture inside an image."""
    # The border above and to the left of the picture; img2dataset puts the smaller half of an odd border there.
    top, left = ((size - side) // 2 for size, side in zip(size_px, content_px, strict=True))
    box = centre_region(content_px, bucket_px)
    return box[0] + left, box[1] + top, box[2] + left, box[3] + top


def _covers_twice(region: tuple[float, float, float, float], bucket_px: tuple[int, int]) -> bool:
    left, top, right, bottom = region
    return min((bottom - top) / bucket_px[0], (right - left) / bucket_px[1]) >= 2


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(ErrorCause.TOO_MANY_PIXELS, str(error)) from error
    except UnidentifiedImageError as error:
        raise SampleError(ErrorCause.BAD_IMAGE, f"not a JPEG, PNG or WebP ({len(data)} bytes)") from error
    except Exception as error:  # As in decode_image.
        raise SampleError(ErrorCause.BAD_IMAGE, f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise SampleError(ErrorCause.TOO_MANY_PIXELS, f"{height} x {width} pixels, the limit is {MAX_IMAGE_PIXELS}")
    return image


def _orientation(image: Image.Image) -> int:
    # For a PNG without EXIF, getexif() would decode the whole image.
    if "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:  # As in decode_image.
        raise SampleError(ErrorCause.BAD_IMAGE, f"EXIF: {type(error).__name__}: {error}") from error


def _upright_size_px(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in _SWAPS_SIDES else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _ALPHA_MODES:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode in _DEEP_GRAY_MODES:
        # Pillow would clip 16-bit grey at 255.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if mode in _DIRECT_MODES:
        return image.convert("RGB")
    raise SampleError(ErrorCause.UNSUPPORTED_MODE, f"pixel mode {mode}")
