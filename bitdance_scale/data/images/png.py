"""PNG files: whether they are complete, and their samples.

Pillow leaves rows black that are missing from a sound stream, and checks neither its length nor its end. `parse` walks
all chunks and inflates the rows once to count them. What Pillow then decodes is the same picture in the chunks that it
needs: its readers of metadata, some of which refuse sound files, see nothing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from bitdance_scale.data.images.limits import MAX_CHUNKS, MAX_PROFILE_BYTES, bad_image, too_expensive

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""The colour types of the standard."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NUM_SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
# First column and row of the seven passes of an interlaced picture, and their steps.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INPUT_BYTES, _OUTPUT_BYTES = 1 << 16, 1 << 20
_head = struct.Struct(">I4s").unpack_from


@dataclass
class PngFile:
    """A PNG whose chunks hold a complete picture.

    Attributes:
        height_px: rows.
        width_px: columns.
        depth: bits of a sample: 1, 2, 4, 8 or 16.
        colour_type: `GREY`, `RGB`, `PALETTE`, `GREY_ALPHA` or `RGB_ALPHA`.
        is_interlaced: whether the rows come in the seven passes of Adam7.
        palette: content of PLTE, or nothing.
        transparency: content of tRNS; None: no such chunk.
        is_srgb: whether the file says that its colours are sRGB.
        profile: ICC profile, or None.
        gamma: exponent of the file (gAMA), or None.
        chromaticities: x and y of white, red, green and blue (cHRM), or None.
        rows: the compressed rows.
    """

    height_px: int
    width_px: int
    depth: int
    colour_type: int
    is_interlaced: bool
    palette: bytes = b""
    transparency: bytes | None = None
    is_srgb: bool = False
    profile: bytes | None = None
    gamma: float | None = None
    chromaticities: tuple[float, ...] | None = None
    rows: bytes = b""


def parse(data: bytes) -> PngFile:
    """Walks the chunks up to the end chunk, and counts what the compressed rows hold. Bytes after that are not read.

    Raises:
        SampleError: a chunk is damaged, missing or out of order, or the rows are not exactly those of the picture.
    """
    rows: list[bytes] = []
    png: PngFile | None = None
    are_rows_over = False
    for kind, content in _chunks(data):
        if png is None:
            if kind != b"IHDR":
                raise bad_image("PNG: the first chunk is not IHDR")
            png = _header(content)
        elif kind == b"IDAT":
            if are_rows_over:
                raise bad_image("PNG: the chunks of its rows do not follow each other")
            rows.append(content)
        else:
            are_rows_over = bool(rows)
            if kind == b"IEND":
                break
            _take(png, kind, content, are_rows_over)
    else:
        raise bad_image("PNG: the file ends before its end chunk")
    assert png is not None
    if png.colour_type == PALETTE and not png.palette:
        raise bad_image("PNG: the palette is missing")
    png.rows = b"".join(rows)
    _check_rows(png)
    return png


def decode(png: PngFile, is_low_byte: bool = False) -> Image.Image:
    """The samples as stored: mode 1, L, I;16, LA, P, RGB or RGBA. 16-bit colours keep their high byte.

    Args:
        png: what `parse` returned.
        is_low_byte: whether to return the low byte of 16-bit RGB or RGBA samples instead.

    Raises:
        SampleError: the rows are corrupt, or a sample has no colour in the palette.
    """
    try:
        image = PngImageFile(io.BytesIO(_critical_chunks(png)))
        if is_low_byte:
            # PNG has the high byte first. A reader of the other order takes the second byte for the high one.
            image.tile = [tile._replace(args=f"{image.mode};16L") for tile in image.tile]
        image.load()
    except Exception as error:  # On damaged bytes Pillow raises nearly anything.
        raise bad_image(f"PNG: {type(error).__name__}: {error}") from error
    if png.colour_type == PALETTE:
        highest = int(np.asarray(image).max())
        if highest >= len(png.palette) // 3:
            raise bad_image(f"PNG: sample {highest} of a palette of {len(png.palette) // 3} colours")
    return image


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place, view = len(_SIGNATURE), memoryview(data)
    for _ in range(MAX_CHUNKS):
        if place + 12 > len(data):
            return
        length, kind = _head(data, place)
        stop = place + 8 + length
        if stop + 4 > len(data):
            raise bad_image(f"PNG: the chunk at byte {place} is cut")
        if zlib.crc32(view[place + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            raise bad_image(f"PNG: the chunk at byte {place} fails its checksum")
        yield kind, data[place + 8 : stop]
        place = stop + 4
    raise too_expensive(f"PNG: more than {MAX_CHUNKS} chunks")


def _header(content: bytes) -> PngFile:
    if len(content) != 13:
        raise bad_image("PNG: IHDR has a wrong length")
    width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(">IIBBBBB", content)
    if depth not in _DEPTHS.get(colour_type, ()) or compression or filtering or interlace > 1:
        raise bad_image(f"PNG: colour type {colour_type} of {depth} bits, or a method that is not defined")
    return PngFile(height, width, depth, colour_type, interlace == 1)


def _take(png: PngFile, kind: bytes, content: bytes, are_rows_over: bool) -> None:
    """Notes what a chunk other than header, rows and end says."""
    if kind == b"IHDR":
        raise bad_image("PNG: two header chunks")
    if kind == b"PLTE":
        if are_rows_over or png.palette or len(content) % 3 or not 3 <= len(content) <= 768:
            raise bad_image("PNG: the palette has a wrong length or place")
        png.palette = content
    elif not kind[0] & 0x20:
        raise bad_image(f"PNG: critical chunk {kind!r} is not known")
    elif are_rows_over:
        return
    elif kind == b"tRNS":
        # As in browsers, one of a wrong length does not count.
        if png.colour_type == PALETTE:
            png.transparency = content[: len(png.palette) // 3]
        elif len(content) == {GREY: 2, RGB: 6}.get(png.colour_type):
            png.transparency = content
    elif kind == b"sRGB":
        png.is_srgb = True
    elif kind == b"iCCP":
        png.profile = _inflated_profile(content)
    elif kind == b"gAMA" and len(content) == 4:
        png.gamma = int.from_bytes(content, "big") / 100_000 or None
    elif kind == b"cHRM" and len(content) == 32:
        png.chromaticities = tuple(value / 100_000 for value in struct.unpack(">8I", content))


def _inflated_profile(content: bytes) -> bytes | None:
    """The profile of an iCCP chunk, after its name and a byte for the method; None if it is damaged or too large."""
    _, _, rest = content.partition(b"\x00")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def _rows(png: PngFile) -> Iterator[tuple[int, int]]:
    """(rows, bytes of one row with its filter byte) of every pass that is not empty."""
    bits = png.depth * _NUM_SAMPLES[png.colour_type]
    passes = _ADAM7 if png.is_interlaced else ((0, 0, 1, 1),)
    for left, top, across, down in passes:
        width, height = -(-(png.width_px - left) // across), -(-(png.height_px - top) // down)
        if width > 0 and height > 0:
            yield height, 1 + (width * bits + 7) // 8


def _check_rows(png: PngFile) -> None:
    """Inflates the rows in pieces and counts them; zlib compares their checksum."""
    needed = sum(num_rows * num_bytes for num_rows, num_bytes in _rows(png))
    inflate = zlib.decompressobj()
    found, view = 0, memoryview(png.rows)
    try:
        for start in range(0, len(view), _INPUT_BYTES):
            rest: bytes | memoryview = view[start : start + _INPUT_BYTES]
            num_bytes = _OUTPUT_BYTES
            # As long as a whole piece comes out, more may be waiting.
            while num_bytes == _OUTPUT_BYTES and found <= needed and not inflate.eof:
                num_bytes = len(inflate.decompress(rest, _OUTPUT_BYTES))
                rest = inflate.unconsumed_tail
                found += num_bytes
    except zlib.error as error:
        raise bad_image(f"PNG: the rows: {error}") from error
    if found != needed:
        raise bad_image(f"PNG: the rows take {needed} bytes, the file has {'more' if found > needed else found}")
    if not inflate.eof:
        raise bad_image("PNG: the end of the compressed rows is missing")


def _critical_chunks(png: PngFile) -> bytes:
    header = struct.pack(
        ">IIBBBBB", png.width_px, png.height_px, png.depth, png.colour_type, 0, 0, int(png.is_interlaced)
    )
    chunks = [(b"IHDR", header), (b"IDAT", png.rows), (b"IEND", b"")]
    if png.colour_type == PALETTE:
        chunks.insert(1, (b"PLTE", png.palette))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
        for kind, content in chunks
    )
