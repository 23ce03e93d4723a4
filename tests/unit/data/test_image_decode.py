"""Decoding: every kind of picture to RGB, the centre crop, and sample errors instead of half pictures."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from bitdance_scale.data import image_decode
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import decode_image, read_size_px
from bitdance_scale.data.images.header import sniff
from bitdance_scale.data.images.limits import MAX_CHUNKS, MAX_PROFILE_BYTES, MAX_SCANS
from bitdance_scale.data.images.resize import ResizeMethod, centre_region
from tests.unit.data.images.png_writer import chunk, write_png
from tests.unit.data.images.sound_files import SoundFile, jpegs, pngs, webps
from tests.unit.data.small_data import encode_image


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def error_of(data: bytes, stored_px: tuple[int, int] = (40, 60)) -> SampleError:
    with pytest.raises(SampleError) as caught:
        decode_image(data, stored_px, (16, 16))
    return caught.value


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [
        ("PNG", "RGB", 0),
        ("WEBP", "RGB", 0),
        ("PNG", "RGBA", 0),
        ("PNG", "L", 0),
        ("PNG", "LA", 0),
        ("PNG", "1", 0),
        # The levels of the web palette are 51 apart, and dithering takes the one above or below.
        ("PNG", "P", 51),
        # JPEG of a smooth picture at quality 75; CMYK converts twice.
        ("JPEG", "RGB", 24),
        ("JPEG", "L", 24),
        ("JPEG", "CMYK", 24),
    ],
)
def test_every_mode_becomes_rgb(kind: str, mode: str, tolerance: int) -> None:
    data = encode_image(40, 60, seed=1, kind=kind, mode=mode)
    pixels = decode_image(data, (40, 60), (40, 60))
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    reference = Image.open(io.BytesIO(encode_image(40, 60, seed=1, kind="PNG"))).convert("RGB")
    if mode in ("L", "LA", "1"):
        reference = reference.convert(mode[0]).convert("RGB")
    assert np.abs(pixels.astype(int) - np.asarray(reference)).max() <= tolerance


def test_sixteen_bit_gray_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, axis=0)
    pixels = decode_image(saved(Image.fromarray(ramp), "PNG"), (8, 64), (8, 64))
    assert np.array_equal(pixels[..., 0], ramp >> 8)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    assert (decode_image(saved(clear, "PNG"), (40, 60), (16, 16)) == 255).all()
    palette = Image.new("P", (60, 40), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode_image(saved(palette, "PNG", transparency=0), (40, 60), (16, 16)) == 255).all()


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_image(data, (40, 60), (16, 16)) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = np.zeros((40, 60, 3), dtype=np.uint8)
    stored[:20, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(stored), "JPEG", exif=exif, quality=95)
    size = (60, 40) if orientation >= 5 else (40, 60)
    assert read_size_px(data) == size
    pixels = decode_image(data, size, size)
    # Where the EXIF standard puts the top left corner of the stored picture.
    rows, columns = size[0] // 2, size[1] // 2
    top, bottom = pixels[:rows], pixels[rows:]
    corners = {"tl": top[:, :columns], "tr": top[:, columns:], "bl": bottom[:, :columns], "br": bottom[:, columns:]}
    expected = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    assert max(corners, key=lambda name: corners[name].mean()) == expected


def test_crop_is_centred_and_keeps_the_aspect() -> None:
    assert centre_region((100, 300), (32, 32)) == (100.0, 0.0, 200.0, 100.0)
    assert centre_region((300, 100), (16, 32)) == (0.0, 125.0, 100.0, 175.0)
    columns = np.zeros((40, 120, 3), dtype=np.uint8)
    columns[:, 40:80] = 255
    pixels = decode_image(saved(Image.fromarray(columns), "PNG"), (40, 120), (20, 20))
    # For the outermost columns the filter reaches across the edge of the crop into the black.
    assert (pixels[:, 1:-1] >= 253).all() and (pixels >= 230).all()


def test_resize_is_antialiased() -> None:
    """A checkerboard of single pixels becomes its mean; plain subsampling would give 0 or 255."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = decode_image(saved(Image.fromarray(board), "PNG"), (64, 64), (16, 16))
    # At the rim, where its window is cut, Lanczos is up to two levels off.
    assert np.abs(pixels.astype(int) - 127.5).max() < 3


def test_a_damaged_file_is_a_sample_error() -> None:
    jpeg = encode_image(40, 60)
    png = encode_image(40, 60, kind="PNG")
    assert error_of(jpeg[:-200]).cause == ErrorCause.BAD_IMAGE
    assert error_of(png[: len(png) // 2]).cause == ErrorCause.BAD_IMAGE
    assert error_of(b"").cause == ErrorCause.BAD_IMAGE
    assert "not a JPEG, PNG or WebP (3 bytes)" in str(error_of(b"GIF"))
    assert error_of(saved(Image.new("RGB", (60, 40)), "GIF")).cause == ErrorCause.BAD_IMAGE


def test_kinds_of_jpeg_that_cannot_be_checked_are_unsupported() -> None:
    jpeg = saved(Image.new("RGB", (60, 40)), "JPEG", subsampling=2)
    frame = jpeg.index(b"\xff\xc0")
    components = jpeg[frame + 10 : frame + 19]
    for place, content in (
        (frame + 1, b"\xc3"),  # lossless
        (frame + 1, b"\xc5"),  # hierarchical
        (frame + 4, b"\x0c"),  # 12 bits
        (frame + 11, b"\x31"),  # chroma of a third
        (frame + 2, b"\x00\x0e" + jpeg[frame + 4 : frame + 9] + b"\x02" + components[:6] + b"\xff\xfe\x00\x03"),
    ):
        error = error_of(jpeg[:place] + content + jpeg[place + len(content) :])
        assert error.cause == ErrorCause.UNSUPPORTED_MODE, error


def test_another_size_than_indexed_is_a_sample_error() -> None:
    error = error_of(encode_image(40, 61))
    assert error.cause == ErrorCause.SIZE_MISMATCH and "(40, 61)" in str(error) and "(40, 60)" in str(error)


@pytest.mark.parametrize("side", [8193, 60_000])
def test_bomb_is_refused_by_its_header(side: int) -> None:
    """A PNG of a few bytes that claims `side` squared pixels; decoding it would take gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert error_of(bomb, (side, side)).cause == ErrorCause.TOO_MANY_PIXELS


@pytest.mark.parametrize("files", [jpegs, pngs, webps])
def test_random_bytes_give_pixels_or_a_sample_error(files: Callable[[], Iterator[SoundFile]]) -> None:
    """Overwritten, removed and repeated bytes; in a PNG also with checksums that hold."""
    numbers = np.random.default_rng(0)
    for file in files():
        for _ in range(6):
            damaged = bytearray(file.data)
            for place in numbers.integers(0, len(damaged), int(numbers.integers(1, 6))).tolist():
                damaged[place] = int(numbers.integers(256))
            start, stop = sorted(numbers.integers(0, len(damaged), 2).tolist())
            match int(numbers.integers(4)):
                case 0:
                    del damaged[start:stop]
                case 1:
                    damaged[start:start] = damaged[start:stop]
            data = with_checksums(bytes(damaged)) if files is pngs else bytes(damaged)
            header = sniff(data)
            size_px = header.stored_px if header and max(header.stored_px) < 1000 else file.pixels.shape[:2]
            for resize in ResizeMethod:
                with contextlib.suppress(SampleError):
                    assert decode_image(data, size_px, (16, 16), None, resize).shape == (16, 16, 3)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks, as far as there are any, have the checksums of their contents."""
    place, parts = 8, [data[:8]]
    while place + 12 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        parts.append(chunk(data[place + 4 : place + 8], data[place + 8 : stop]))
        place = stop + 4
    return b"".join(parts)


def detailed_picture(height: int, width: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, about as in photographs."""
    numbers = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width)) ** 1.3
    planes = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * numbers.random(amplitude.shape)), s=(height, width))
        for _ in range(3)
    ]
    pixels = np.stack(planes, axis=-1)
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size_px", [(512, 512), (513, 771), (400, 1003), (1037, 411)])
def test_fast_decodes_large_jpegs_at_half_size(size_px: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are those of Pillow's own decoding at half size, and one Lanczos pass."""
    data = saved(detailed_picture(*size_px, seed=1), "JPEG", quality=90)
    shapes = []
    decode = simplejpeg.decode_jpeg

    def noted(*args: object, **options: object) -> np.ndarray:
        pixels = decode(*args, **options)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    half = Image.open(io.BytesIO(data))
    half.draft("RGB", (half.width // 2, half.height // 2))
    box = tuple(side / 2 for side in centre_region(size_px, (192, 192)))
    expected = np.asarray(half.resize((192, 192), Image.Resampling.LANCZOS, box=box))
    assert np.array_equal(decode_image(data, size_px, (192, 192), resize="fast"), expected)
    # Twice as large is the least, and "sharp" decodes everything.
    above_half = min(size_px) // 2 + 1
    decode_image(data, size_px, (above_half, above_half), resize="fast")
    decode_image(data, size_px, (192, 192))
    assert shapes == [half.size[::-1], size_px, size_px]


@pytest.mark.parametrize("bucket_px", [(192, 192), (128, 320), (500, 500)])
def test_sharp_is_one_lanczos_pass_over_the_whole_picture(bucket_px: tuple[int, int]) -> None:
    """At any ratio, also where it enlarges: Pillow's pixels, but where the region ends inside a pixel."""
    size_px = (400, 600)
    data = saved(detailed_picture(*size_px, seed=1), "JPEG", quality=90)
    expected = Image.open(io.BytesIO(data)).resize(
        bucket_px[::-1], Image.Resampling.LANCZOS, box=centre_region(size_px, bucket_px)
    )
    found = decode_image(data, size_px, bucket_px)
    assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 0.3


def test_the_sides_before_the_rotation_are_accepted() -> None:
    """img2dataset stores them when it keeps the original bytes."""
    stored = np.zeros((40, 60, 3), dtype=np.uint8)
    stored[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(stored), "PNG", exif=exif)
    upright = decode_image(data, (60, 40), (30, 20))
    assert np.array_equal(decode_image(data, (40, 60), (30, 20)), upright)
    # The left third became the upper one, up to the ringing of the filter.
    assert (upright[:9] > 230).all() and (upright[11:] < 25).all()
    # The content of such a record is turned with it.
    whole = decode_image(data, (40, 60), (58, 38), (38, 58))
    assert np.array_equal(whole, decode_image(data, (60, 40), (60, 40))[1:59, 1:39])
    assert error_of(data, (41, 60)).cause == ErrorCause.SIZE_MISMATCH


def test_size_from_the_first_bytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    for kind in ("JPEG", "PNG"):
        data = saved(detailed_picture(300, 200, seed=1), kind, exif=exif)
        assert read_size_px(data[:2000]) == read_size_px(data) == (200, 300)


@pytest.mark.parametrize("resize", list(ResizeMethod))
def test_a_border_is_left_out(resize: ResizeMethod) -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[12:51] = 0
    # Under Lanczos a sharp edge at the border would ring; no pixel of it may come in.
    pixels = decode_image(saved(Image.fromarray(picture), "PNG"), (64, 64), (16, 16), (37, 64), resize)
    assert pixels.max() <= (0 if resize == ResizeMethod.SHARP else 40)


def test_more_scans_than_encoders_write_are_refused_before_decoding() -> None:
    """Each of them would take a tenth of a second at 8192 x 8192."""
    for num_scans, sides in ((MAX_SCANS + 1, (16, 16)), (30, (8192, 8192))):
        data = saved(Image.new("L", (16, 16), 90), "JPEG", progressive=True)
        frame, scan = data.index(b"\xff\xc2"), data.index(b"\xff\xda")
        data = data[: frame + 5] + struct.pack(">HH", *sides) + data[frame + 9 :]
        # Scans of one coefficient each, from the second on.
        stop = data.index(b"\xff", scan + 10)
        table = data[data.rindex(b"\xff\xc4") : data.rindex(b"\xff\xda")]
        scans = [
            b"\xff\xda\x00\x08\x01\x01\x00" + bytes([1 + n % 63, 1 + n % 63, (0x0D, 0xDC)[n // 63]]) + b"\x00"
            for n in range(num_scans)
        ]
        error = error_of(data[:stop] + table + b"".join(scans) + b"\xff\xd9", sides)
        assert error.cause == ErrorCause.TOO_EXPENSIVE, error


def test_files_of_too_many_bytes_or_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    png = write_png(np.zeros((40, 60, 3), int), 8, 2)
    empty = b"".join([chunk(b"IDAT", b"")] * (MAX_CHUNKS + 1))
    assert error_of(png.replace(chunk(b"IEND", b""), empty)).cause == ErrorCause.TOO_EXPENSIVE
    jpeg = encode_image(40, 60)
    scan = jpeg.index(b"\xff\xda")
    comments = b"\xff\xfe\x00\x02" * (MAX_CHUNKS + 1)
    assert error_of(jpeg[:scan] + comments + jpeg[scan:]).cause == ErrorCause.TOO_EXPENSIVE
    monkeypatch.setattr(image_decode, "MAX_IMAGE_BYTES", len(jpeg) - 1)
    assert error_of(jpeg).cause == ErrorCause.TOO_EXPENSIVE


def test_a_bomb_in_the_metadata_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 24), 9)
    samples = np.full((40, 60, 3), 77)
    for kind, head in ((b"iCCP", b"x\x00\x00"), (b"zTXt", b"x\x00\x00"), (b"iTXt", b"x\x00\x01\x00\x00\x00")):
        tracemalloc.start()
        pixels = decode_image(write_png(samples, 8, 2, before=chunk(kind, head + bomb)), (40, 60), (40, 60))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (pixels == 77).all() and peak_bytes < 2 * MAX_PROFILE_BYTES + (1 << 20)
