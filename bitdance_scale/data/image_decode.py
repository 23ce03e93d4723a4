"""From the bytes of an image file to the pixels of its bucket.

Strict: an image that is cut, damaged or not of the indexed size is a fault, never a half grey picture. EXIF orientation
is applied, transparency is laid over white, and an animation gives its first frame.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitdance_scale.data.data_errors import ErrorCause, SampleError

DECODE_VERSION = 1
"""Another where the same file would give other pixels."""
# 8192 x 8192: 200 MB decoded, more than any bucket can use; a header that claims more is a fault before decoding.
MAX_IMAGE_PIXELS = 1 << 26

# Pillow loads its plugins at first need; two threads in need at once would race.
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
    """(height, width) of an upright image, from its header alone.

    Raises:
        SampleError: no image, or one of more than `MAX_IMAGE_PIXELS`.
    """
    with _open(data) as image:
        return _upright_size_px(image)


def decode_image(
    data: bytes, stored_px: tuple[int, int], bucket_px: tuple[int, int], content_px: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes an image, resizes it to cover the bucket and crops the centre.

    One Lanczos pass with antialiasing over the centred region that has the bucket's aspect. A JPEG at least twice as
    large is decoded at half its size, which is four times as fast and costs less than 1 dB; at a quarter it would cost
    more, whatever is left to resize (docs/benchmarks.md).

    Args:
        data: a JPEG, PNG or WebP file.
        stored_px: (height, width) that the index has for it.
        bucket_px: (height, width) wanted.
        content_px: (height, width) of the picture in the middle of the stored image, the rest is border; None: all.

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
                    # Of an odd side the last pixel is half outside, so it is the region that is exactly half.
                    region = tuple(side / 2 for side in region)
            image.load()
        except Exception as error:  # Damaged bytes make Pillow's plugins raise nearly anything.
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
    """The centre of the picture inside an image: (left, top, right, bottom)."""
    # The border above and left of the picture; of an odd one the smaller half, as img2dataset pads.
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
        raise SampleError(ErrorCause.BAD_IMAGE, f"no JPEG, PNG or WebP ({len(data)} bytes)") from error
    except Exception as error:  # As in decode_image.
        raise SampleError(ErrorCause.BAD_IMAGE, f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise SampleError(ErrorCause.TOO_MANY_PIXELS, f"{height} x {width} pixels, the cap is {MAX_IMAGE_PIXELS}")
    return image


def _orientation(image: Image.Image) -> int:
    # Asking Pillow for the EXIF of a PNG without any would decode it.
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
