"""Files with missing or corrupt data: none of them gives a picture.

What no decoder can see is not asked for: a flipped bit in entropy-coded data of JPEG or WebP, which have no checksum.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg

from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.header import sniff
from tests.unit.data.images.png_writer import SIGNATURE, chunk, packed_rows, write_png
from tests.unit.data.images.sound_files import picture, saved

SIDE_PX = 64
Damage = tuple[str, bytes]


def sound_jpegs() -> Iterator[Damage]:
    """Every way in which pixels are coded."""
    for is_progressive in (False, True):
        for name, mode, options in (
            ("4:4:4", "RGB", {"subsampling": 0}),
            ("4:2:2", "RGB", {"subsampling": 1}),
            ("4:2:0", "RGB", {"subsampling": 2}),
            ("grey", "L", {}),
            ("CMYK", "CMYK", {}),
            ("restarts", "RGB", {"restart_marker_blocks": 3}),
        ):
            image = picture(SIDE_PX, SIDE_PX, 1, mode)
            yield f"{name} {is_progressive}", saved(image, "JPEG", progressive=is_progressive, quality=90, **options)
    cmyk = np.array(picture(SIDE_PX, SIDE_PX, 1, "CMYK"))
    yield "YCCK", simplejpeg.encode_jpeg(cmyk, 90, "CMYK", "420")


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, first byte, byte behind it) of all segments of a JPEG; a scan ends with its entropy-coded data."""
    found, place = [], 2
    while data[place + 1] != 0xD9:
        marker, start = data[place + 1], place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            match = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, place)
            assert match
            place = match.start()
        found.append((marker, start, place))
    return found


def damaged_jpegs() -> Iterator[Damage]:
    """Cuts, lost ranges and segments, broken markers, and tables that do not fit the data."""
    numbers = np.random.default_rng(0)
    for name, data in sound_jpegs():
        parts = segments(data)
        first_scan = next(start for marker, start, _ in parts if marker == 0xDA)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            cut = data[: int(share * len(data))]
            yield f"{name}: cut at {share}", cut
            if len(cut) > first_scan:
                yield f"{name}: cut at {share}, with an end marker", cut + b"\xff\xd9"
            if first_scan < len(cut) and share <= 0.9:
                yield f"{name}: from {share} on zeros", cut.ljust(len(data) - 2, b"\x00") + b"\xff\xd9"
        yield f"{name}: no end marker", data[:-2]
        yield f"{name}: no end marker, bytes behind", data[:-2] + bytes(100)
        for marker, start, stop in parts:
            # Without JFIF or Adobe marker the colours are guessed: no data of the picture are lost.
            if marker not in (0xE0, 0xEE, 0xDD):
                yield f"{name}: without the segment {marker:02X} at {start}", data[:start] + data[stop:]
            if marker in (0xC0, 0xC2, 0xDA):
                yield f"{name}: segment {marker:02X} at {start} twice", data[:stop] + data[start:stop] + data[stop:]
        for _ in range(6):
            start = int(numbers.integers(first_scan + 20, len(data) - 300))
            yield f"{name}: 250 bytes from {start} on lost", data[:start] + data[start + 250 :]
            yield f"{name}: zeros between segments", data[:first_scan] + b"\x00\x00\x00" + data[first_scan:]
        for place in [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data[first_scan:])][:6]:
            restart = first_scan + place
            yield f"{name}: restart at {restart} lost", data[:restart] + data[restart + 2 :]
            yield (
                f"{name}: restart at {restart} is another",
                data[: restart + 1] + b"\xd3\xff\xd1" + data[restart + 4 :],
            )
        middle = (first_scan + len(data)) // 2
        yield f"{name}: an end marker in the middle", data[:middle] + b"\xff\xd9" + data[middle:]
        yield f"{name}: a marker in the middle", data[:middle] + b"\xff\xc4" + data[middle:]
        yield f"{name}: a block of 512 bytes of another file", data[:middle] + numbers.bytes(512) + data[middle + 512 :]


def sound_pngs() -> Iterator[tuple[str, np.ndarray, int, int, bool]]:
    """Name, samples, depth, colour type and whether interlaced, of every kind."""
    numbers = np.random.default_rng(1)
    for colour_type, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        num_samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
        for depth in depths:
            for is_interlaced in (False, True):
                samples = numbers.integers(0, 1 << depth, (SIDE_PX, SIDE_PX, num_samples))
                yield f"type {colour_type}, {depth} bits, {is_interlaced}", samples, depth, colour_type, is_interlaced


def damaged_pngs() -> Iterator[Damage]:
    """Cuts, flipped bits, lost chunks and streams that hold other rows than the picture has."""
    numbers = np.random.default_rng(2)
    for name, samples, depth, colour_type, is_interlaced in sound_pngs():
        before = chunk(b"PLTE", bytes(3 << depth)) if colour_type == 3 else b""

        def write(rows: bytes | None = None, before: bytes = before, kind: tuple = (depth, colour_type)) -> bytes:
            return write_png(samples, *kind, is_interlaced, before, rows, idat_bytes=200)  # noqa: B023

        data, packed = write(), packed_rows(samples, depth, is_interlaced)
        decode_image(data, (SIDE_PX, SIDE_PX), (8, 8))
        compressed = zlib.compress(packed)
        for share in (0.2, 0.5, 0.9):
            yield f"{name}: cut at {share}", data[: int(share * len(data))]
            yield f"{name}: {share} of the rows", write(zlib.compress(packed[: int(share * len(packed))]))
        yield f"{name}: one byte of the rows is missing", write(zlib.compress(packed[:-1]))
        yield f"{name}: one row more", write(zlib.compress(packed + packed[:9]))
        yield f"{name}: no checksum of the rows", write(compressed[:-4])
        yield f"{name}: wrong checksum of the rows", write(compressed[:-1] + bytes([compressed[-1] ^ 1]))
        yield f"{name}: a filter that is not defined", write(zlib.compress(b"\x07" + packed[1:]))
        yield f"{name}: no end chunk", data[:-12]
        for _ in range(4):
            place = int(numbers.integers(8, len(data)))
            yield f"{name}: flipped bit in byte {place}", data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        chunks = [match.start() - 4 for match in re.finditer(b"IDAT", data)]
        for start in chunks[:2]:
            stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
            yield f"{name}: the chunk at {start} is lost", data[:start] + data[stop:]
        place = chunks[-1]
        yield f"{name}: another chunk between the rows", data[:place] + chunk(b"tEXt", b"a\x00b") + data[place:]
        if colour_type == 3:
            yield f"{name}: no palette", write(before=b"")
            if samples.max() > 0:
                yield f"{name}: a palette that is too short", write(before=chunk(b"PLTE", bytes(3)))
            yield f"{name}: a palette of 4 bytes", write(before=chunk(b"PLTE", bytes(4)))
    yield "two headers", data[:33] + data[8:33] + data[33:]
    yield "no header", SIGNATURE + data[33:]
    yield "a critical chunk that nobody knows", data[:33] + chunk(b"ABCD", b"") + data[33:]


def damaged_webps() -> Iterator[Damage]:
    """Cuts, with the sizes of the container as they were and mended, lost ranges and wrong sizes."""
    rgb = picture(SIDE_PX, SIDE_PX, 1)
    rgba = rgb.copy()
    rgba.putalpha(picture(SIDE_PX, SIDE_PX, 2, "L"))
    for name, image, options in (
        ("lossy", rgb, {"quality": 90}),
        ("lossless", rgb, {"lossless": True}),
        ("alpha, lossy", rgba, {"quality": 90}),
        ("alpha, lossless", rgba, {"lossless": True}),
        ("metadata", rgb, {"exif": b"Exif\x00\x00MM\x00*" + bytes(50)}),
    ):
        data = saved(image, "WEBP", **options)
        for share in np.linspace(0.03, 0.99, 24):
            cut = data[: int(share * len(data))]
            yield f"{name}: cut at {share:.2f}", cut
            yield f"{name}: cut at {share:.2f}, with its size", with_size(cut)
        for length in (1, 2, 3, 4, 8):
            yield f"{name}: {length} bytes lost at the end", data[:-length]
        for size in (0, 4, 12, len(data), 1 << 31, (1 << 32) - 1):
            yield f"{name}: container of {size} bytes", data[:4] + struct.pack("<I", size) + data[8:]
            yield f"{name}: first chunk of {size} bytes", data[:16] + struct.pack("<I", size) + data[20:]
        yield f"{name}: another kind of first chunk", data[:12] + b"ABCD" + data[16:]


def with_size(data: bytes) -> bytes:
    """A WebP whose container and last chunk end where the file ends."""
    mended = bytearray(data)
    mended[4:8] = struct.pack("<I", max(len(mended) - 8, 0))
    place = 12
    while place + 8 <= len(mended):
        (length,) = struct.unpack_from("<I", mended, place + 4)
        if place + 8 + length > len(mended):
            mended[place + 4 : place + 8] = struct.pack("<I", len(mended) - place - 8)
        place += 8 + length + length % 2
    return bytes(mended)


@pytest.mark.parametrize("damages", [damaged_jpegs, damaged_pngs, damaged_webps])
def test_no_damaged_file_gives_a_picture(damages) -> None:
    decoded, count = [], 0
    for name, data in damages():
        count += 1
        try:
            decode_image(data, sniff(data).stored_px if sniff(data) else (SIDE_PX, SIDE_PX), (8, 8))
            decoded.append(name)
        except SampleError as error:
            assert error.cause in (ErrorCause.BAD_IMAGE, ErrorCause.UNSUPPORTED_MODE), (name, error)
    assert not decoded and count >= 200
