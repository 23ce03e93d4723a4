"""From the bytes of a picture to what is written into a shard, or why it is skipped.

JPEG, PNG and WebP, which training reads, are kept byte for byte. GIF, BMP, TIFF, JPEG 2000 and AVIF are converted to
PNG, which loses nothing; a colour profile stays. An animation gives its first frame, as in training. HEIC and anything
else is skipped and reported, because Pillow cannot read it by itself.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.image_decode import decode_image, read_size_px
from bitdance_scale.data.images.colour import to_srgb
from bitdance_scale.data.images.limits import MAX_IMAGE_PIXELS
from bitdance_scale.data.shard_writing.source import SkippedPicture

_CONVERTED = ("GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_TO_RGB_MODES = ("YCbCr", "LAB", "HSV")
_ALPHA_MODES = ("PA", "RGBa", "La", "RGBX")
# Decoding goes through the whole file whatever the size of the result, so the result is small.
_CHECK_PX = (16, 16)


@dataclass(frozen=True)
class CheckedPicture:
    """A picture as it is written.

    Attributes:
        content: the bytes of the file.
        extension: `jpg`, `png` or `webp`, by the content.
        size_px: (height, width), upright, as training sees it.
        sha256: of the bytes in the source, in hexadecimal digits.
        converted_from: format of the source if it was converted; empty: the bytes are those of the source.
    """

    content: bytes
    extension: str
    size_px: tuple[int, int]
    sha256: str
    converted_from: str = ""


def check_picture(content: bytes, *, is_decoded: bool) -> CheckedPicture:
    """Makes of a picture what is written.

    Args:
        content: the bytes of the file in the source.
        is_decoded: whether it is decoded, as training will do it; otherwise only its header is read.

    Raises:
        SkippedPicture: it is empty, damaged, too large or of a format that cannot be read.
    """
    if not content:
        raise SkippedPicture("empty_file", "0 bytes")
    digest = hashlib.sha256(content).hexdigest()
    extension, converted_from = _extension(content), ""
    if not extension:
        content, converted_from = _to_png(content)
        extension = "png"
    try:
        size_px = read_size_px(content)
        if is_decoded:
            decode_image(content, size_px, _CHECK_PX)
    except SampleError as error:
        raise SkippedPicture(error.cause, error.detail) from error
    return CheckedPicture(content, extension, size_px, digest, converted_from)


def _extension(content: bytes) -> str:
    """The extension of a file that training reads, by its first bytes; empty for others."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else ""


def _to_png(content: bytes) -> tuple[bytes, str]:
    """A picture as PNG, and the name of the format that it had."""
    try:
        with Image.open(io.BytesIO(content), formats=_CONVERTED) as image:
            kind = (image.format or "").lower()
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                detail = f"{height} x {width} pixels, the limit is {MAX_IMAGE_PIXELS}"
                raise SkippedPicture("too_many_pixels", detail)
            image.load()
            upright = ImageOps.exif_transpose(image)
            file = io.BytesIO()
            profile = image.info.get("icc_profile")
            if upright.mode == "CMYK":
                # A PNG holds no inks.
                upright, profile = to_srgb(upright, profile), None
            # What is left out (times, EXIF) would make the bytes depend on more than the pixels.
            _in_png_mode(upright).save(file, "PNG", exif=b"", icc_profile=profile)
    except SkippedPicture:
        raise
    except UnidentifiedImageError as error:
        detail = f"begins with {content[:12]!r}: no JPEG, PNG, WebP, {', '.join(_CONVERTED)}; convert it before packing"
        raise SkippedPicture("unsupported_format", detail) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkippedPicture("too_many_pixels", str(error)) from error
    except Exception as error:  # On damaged bytes Pillow's plugins raise nearly anything.
        raise SkippedPicture("bad_image", f"{type(error).__name__}: {error}") from error
    return file.getvalue(), kind


def _in_png_mode(image: Image.Image) -> Image.Image:
    mode = image.mode
    if "transparency" in image.info or mode in _ALPHA_MODES:
        return image.convert("RGBA")
    if mode in _PNG_MODES:
        return image
    if mode in _TO_RGB_MODES:
        return image.convert("RGB")
    if mode.startswith("I;16"):
        return image.convert("I;16")
    raise SkippedPicture("unsupported_mode", f"pixel mode {mode}")
