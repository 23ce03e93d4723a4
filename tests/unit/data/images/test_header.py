"""What the first bytes of a file say of its sides and orientation."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.images.header import exif_orientation, sniff

FORMATS = ("JPEG", "PNG", "WEBP")


def saved(kind: str, orientation: int | None = None, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x010F] = "a maker"
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [None, *range(11)])
def test_sides_and_orientation(kind: str, orientation: int | None) -> None:
    header = sniff(saved(kind, orientation))
    known = orientation if orientation in range(1, 9) else 1
    assert header is not None and (header.format, header.stored_px, header.orientation) == (kind, (40, 60), known)
    assert header.upright_px == ((60, 40) if known >= 5 else (40, 60))


@pytest.mark.parametrize("kind", FORMATS)
def test_any_beginning_says_the_same_or_nothing(kind: str) -> None:
    data = saved(kind, 6)
    whole = sniff(data)
    found = [sniff(memoryview(data)[:length]) for length in range(len(data) + 1)]
    assert set(found) == {None, whole} and found[-1] == whole
    # Only WebP keeps its EXIF at the end.
    needed = next(length for length, header in enumerate(found) if header)
    assert all(found[needed:]) and (needed < len(data) / 2) == (kind != "WEBP")


def test_a_webp_without_exif_needs_only_its_beginning() -> None:
    for options in ({"lossless": True}, {"lossless": False}):
        header = sniff(saved("WEBP", **options)[:64])
        assert header is not None and header.upright_px == (40, 60)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_orientation_of_any_integer_type(order: str, kind: int, code: str) -> None:
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    table = struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + struct.pack(order + code, 8)
    exif = mark + struct.pack(order + "I", 8) + table
    assert exif_orientation(exif) == exif_orientation(b"Exif\x00\x00" + exif) == 8
    assert exif_orientation(exif.replace(mark, b"XX\x00*")) == 1
    # The table lies outside the block.
    assert exif_orientation(mark + struct.pack(order + "I", 1 << 31) + table) == 1


def test_garbage_says_nothing_and_raises_nothing() -> None:
    numbers = np.random.default_rng(0)
    assert sniff(b"") is None and sniff(b"GIF89a") is None
    for kind in FORMATS:
        data = np.frombuffer(saved(kind, 6), dtype=np.uint8)[:1500]
        for _ in range(2000):
            damaged = data.copy()
            places = numbers.integers(0, 200, int(numbers.integers(1, 8)))
            damaged[places] = numbers.integers(0, 256, len(places))
            header = sniff(damaged.tobytes()[: int(numbers.integers(0, 1500))])
            assert header is None or (min(header.stored_px) > 0 and 1 <= header.orientation <= 8)
    # A frame of no rows, and more segments than any file has.
    jpeg = saved("JPEG")
    place = jpeg.index(b"\xff\xc0")
    assert sniff(jpeg[: place + 5] + b"\x00\x00" + jpeg[place + 7 :]) is None
    assert sniff(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000 + jpeg[2:]) is None
