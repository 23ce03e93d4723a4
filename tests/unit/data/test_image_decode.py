"""Decoding: every kind of picture to RGB, the centre crop, and sample errors instead of half pictures."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import centre_region, decode_image, read_size_px
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


def test_random_bytes_give_pixels_or_a_sample_error() -> None:
    numbers = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = np.frombuffer(encode_image(40, 60, kind=kind), dtype=np.uint8)
        for _ in range(150):
            damaged = data.copy()
            places = numbers.integers(0, len(data), int(numbers.integers(1, 6)))
            damaged[places] = numbers.integers(0, 256, len(places))
            with contextlib.suppress(SampleError):
                assert decode_image(damaged.tobytes(), (40, 60), (16, 16)).shape == (16, 16, 3)


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


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(found.astype(float) - expected.astype(float)).mean())


@pytest.mark.parametrize("size_px", [(512, 512), (513, 771), (400, 1003), (1037, 411)])
@pytest.mark.parametrize("quality", [75, 95])
def test_half_size_decoding_costs_less_than_one_decibel(size_px: tuple[int, int], quality: int, monkeypatch) -> None:
    """Compared with the picture before compression, resized in one piece."""
    picture = detailed_picture(*size_px, seed=quality)
    bucket_px = (192, 192)
    box = centre_region(size_px, bucket_px)
    truth = np.asarray(picture.resize((192, 192), Image.Resampling.LANCZOS, box=box))
    data = saved(picture, "JPEG", quality=quality)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((192, 192), Image.Resampling.LANCZOS, box=box))
    sizes = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: (sizes.append(image.size), load(image))[1])
    found = decode_image(data, size_px, bucket_px)
    assert sizes[0] == (-(-size_px[1] // 2), -(-size_px[0] // 2))
    assert decibels(found, truth) > decibels(whole, truth) - 1
    # A picture that is less than twice as large is decoded at full size.
    sizes.clear()
    bucket_px = (min(size_px) // 2 + 1, min(size_px) // 2 + 1)
    decode_image(data, size_px, bucket_px)
    assert sizes[0] == size_px[::-1]
