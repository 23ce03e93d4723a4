"""WebP files: whether they are complete, and their pixels.

libwebp itself refuses a picture that is cut. What is checked here is the container around it. As in JPEG, entropy-coded
data have no checksum, so most flipped bits give other pixels.
"""

from __future__ import annotations

import io
import struct

from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from bitdance_scale.data.images.limits import MAX_CHUNKS, MAX_PROFILE_BYTES, bad_image, too_expensive

_head = struct.Struct("<4sI").unpack_from
_PICTURES = (b"VP8 ", b"VP8L", b"ANMF")


def check_container(data: bytes) -> None:
    """Checks that all chunks lie inside the file and that there is a picture. Bytes after the container are not read.

    Raises:
        SampleError: the file is cut, or has no picture.
    """
    _, stop = _head(data, 0)
    stop += 8
    if stop > len(data):
        raise bad_image(f"WebP: the file has {len(data)} bytes of {stop}")
    place, has_picture = 12, False
    for _ in range(MAX_CHUNKS):
        if place + 8 > stop:
            break
        kind, length = _head(data, place)
        if place + 8 + length > stop:
            raise bad_image(f"WebP: the chunk at byte {place} is cut")
        has_picture |= kind in _PICTURES
        place += 8 + length + length % 2
    else:
        raise too_expensive(f"WebP: more than {MAX_CHUNKS} chunks")
    if not has_picture:
        raise bad_image("WebP: there is no picture")


def decode(data: bytes) -> tuple[Image.Image, bytes | None]:
    """The first frame (mode RGB or RGBA), and its ICC profile or None.

    Raises:
        SampleError: the file is damaged.
    """
    check_container(data)
    try:
        image: Image.Image = WebPImageFile(io.BytesIO(data))
        image.load()
    except Exception as error:  # On damaged bytes Pillow raises nearly anything.
        raise bad_image(f"WebP: {type(error).__name__}: {error}") from error
    if image.mode not in ("RGB", "RGBA"):
        image = image.convert("RGB")
    profile = image.info.get("icc_profile")
    return image, profile if profile and len(profile) <= MAX_PROFILE_BYTES else None
