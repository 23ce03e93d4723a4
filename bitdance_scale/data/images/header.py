"""Format, sides and orientation of an image file from its first bytes, without decoding."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations under which an upright picture has its sides exchanged."""

_EXIF_PREFIX = b"Exif\x00\x00"
_ORIENTATION_TAG = 0x0112
# EXIF types of an integer: BYTE, SHORT, LONG. The standard asks for SHORT.
_INTEGERS = {1: "B", 3: "H", 4: "I"}
# Start of frame: all of C0..CF but the tables DHT and DAC and the reserved JPG.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# TEM and RST0..RST7 have no length.
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_FLAG_EXIF = 0x08
# Segments or chunks that are walked: thousands of empty ones are no picture, and would take seconds.
_MAX_STEPS = 4096

_marker_and_length = struct.Struct(">BBH").unpack_from
_jpeg_sides = struct.Struct(">HH").unpack_from
_png_chunk = struct.Struct(">I4s").unpack_from
_png_sides = struct.Struct(">II").unpack_from
_riff_chunk = struct.Struct("<4sI").unpack_from


class ImageFormat(enum.StrEnum):
    """The formats that are decoded, by the names that Pillow has for them."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"


class Header(NamedTuple):
    """What the first bytes of an image file say.

    Attributes:
        format: JPEG, PNG or WebP.
        height_px: rows as stored, before the orientation is applied.
        width_px: columns as stored.
        orientation: EXIF orientation, 1 to 8; 1 if the file has none or one that is not defined.
    """

    format: ImageFormat
    height_px: int
    width_px: int
    orientation: int

    @property
    def stored_px(self) -> tuple[int, int]:
        """(height, width) before the orientation is applied."""
        return self.height_px, self.width_px

    @property
    def upright_px(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        if self.orientation in SWAPPING_ORIENTATIONS:
            return self.width_px, self.height_px
        return self.height_px, self.width_px


def sniff(data: bytes | memoryview) -> Header | None:
    """Reads format, sides and orientation from the first bytes of a file, or from the whole file.

    64 KiB suffice for nearly all files. A JPEG is read up to its frame header and a PNG up to its first pixels; an
    orientation that comes later does not count. A WebP keeps its orientation at its end: if it says that it has one,
    the whole file is needed.

    Args:
        data: bytes from the beginning of the file.

    Returns:
        None if this is no JPEG, PNG or WebP, if a side is 0, or if more bytes are needed. Never raises on damage.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _sniff_jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _sniff_png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _sniff_webp(data)
    except (struct.error, IndexError):  # The data end too early.
        pass
    return None


def exif_orientation(exif: bytes | memoryview) -> int:
    """The orientation in a block of EXIF, 1 to 8; 1 if it has none, is damaged or says something else."""
    if exif[:6] == _EXIF_PREFIX:
        exif = exif[6:]
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(bytes(exif[:4]))
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION_TAG:
                if kind not in _INTEGERS or count != 1:
                    return 1
                (orientation,) = struct.unpack_from(order + _INTEGERS[kind], exif, entry + 8)
                return orientation if 1 <= orientation <= 8 else 1
    except struct.error:
        pass
    return 1


def _header(kind: ImageFormat, height: int, width: int, orientation: int) -> Header | None:
    return Header(kind, height, width, orientation) if height and width else None


def _sniff_jpeg(data: bytes | memoryview) -> Header | None:
    place, orientation, has_exif = 2, 1, False
    for _ in range(_MAX_STEPS):
        prefix, marker, length = _marker_and_length(data, place)
        if prefix != 0xFF or marker in (0x00, 0xD8, 0xD9, 0xDA):
            return None
        if marker == 0xFF or marker in _BARE_MARKERS:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAME_MARKERS:
            height, width = _jpeg_sides(data, place + 5)
            return _header(ImageFormat.JPEG, height, width, orientation)
        if length < 2:
            return None
        if marker == 0xE1 and not has_exif and data[place + 4 : place + 10] == _EXIF_PREFIX:
            has_exif = True
            orientation = exif_orientation(data[place + 10 : place + 2 + length])
        place += 2 + length
    return None


def _sniff_png(data: bytes | memoryview) -> Header | None:
    if data[12:16] != b"IHDR":
        return None
    width, height = _png_sides(data, 16)
    place, orientation = 8, 1
    for _ in range(_MAX_STEPS):
        length, kind = _png_chunk(data, place)
        if kind == b"IDAT":
            return _header(ImageFormat.PNG, height, width, orientation)
        if kind == b"eXIf":
            if place + 8 + length > len(data):
                return None
            orientation = exif_orientation(data[place + 8 : place + 8 + length])
        place += 12 + length
    return None


def _sniff_webp(data: bytes | memoryview) -> Header | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            return None
        width, height = struct.unpack_from("<HH", data, 26)
        return _header(ImageFormat.WEBP, height & 0x3FFF, width & 0x3FFF, 1)
    if kind == b"VP8L":
        signature, sides = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            return None
        return _header(ImageFormat.WEBP, (sides >> 14 & 0x3FFF) + 1, (sides & 0x3FFF) + 1, 1)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    if len(data) < 30:
        return None
    orientation = _webp_orientation(data) if data[20] & _FLAG_EXIF else 1
    return _header(ImageFormat.WEBP, height, width, orientation) if orientation is not None else None


def _webp_orientation(data: bytes | memoryview) -> int | None:
    """None if the file goes on after these bytes, and they do not hold its EXIF."""
    stop = 8 + int.from_bytes(data[4:8], "little")
    place = 12
    for _ in range(_MAX_STEPS):
        if place + 8 > min(stop, len(data)):
            break
        kind, length = _riff_chunk(data, place)
        if kind == b"EXIF" and place + 8 + length <= len(data):
            return exif_orientation(data[place + 8 : place + 8 + length])
        place += 8 + length + length % 2
    return 1 if len(data) >= stop else None
