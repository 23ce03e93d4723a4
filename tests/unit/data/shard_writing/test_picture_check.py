"""Which pictures are written as they are, which are converted, and which are skipped."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.colour import chromaticity_profile, to_srgb
from bitdance_scale.data.shard_writing.picture_check import check_picture
from bitdance_scale.data.shard_writing.source import SkippedPicture
from tests.unit.data.shard_writing.small_sources import noise
from tests.unit.data.small_data import encode_image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.open(io.BytesIO(encode_image(30, 40))).convert(mode)


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_what_training_reads_keeps_its_bytes(kind, extension):
    content = encode_image(30, 40, kind=kind)
    checked = check_picture(content, is_decoded=True)
    assert checked.content == content
    assert (checked.extension, checked.size_px, checked.converted_from) == (extension, (30, 40), "")


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        ("BMP", "RGB", "RGB"),
        ("GIF", "P", "P"),
        ("TIFF", "RGB", "RGB"),
        ("TIFF", "CMYK", "RGB"),
        ("TIFF", "RGBA", "RGBA"),
        ("TIFF", "1", "1"),
        ("JPEG2000", "L", "L"),
    ],
)
def test_other_formats_become_png_without_loss(kind, mode, expected):
    image = picture(mode)
    checked = check_picture(saved(image, kind), is_decoded=True)
    assert (checked.extension, checked.converted_from) == ("png", kind.lower())
    stored = Image.open(io.BytesIO(checked.content))
    assert stored.mode == expected
    # The colours of a palette may be stored in another order.
    assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(image.convert("RGB")))


def test_a_conversion_keeps_the_colours_of_a_profile():
    """Of primaries wider than those of sRGB."""
    profile = chromaticity_profile((0.3457, 0.3585, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06))
    image = Image.new("RGB", (40, 30), (40, 200, 40))
    checked = check_picture(saved(image, "TIFF", icc_profile=profile), is_decoded=True)
    expected = np.asarray(to_srgb(image, profile))
    found = decode_image(checked.content, (30, 40), (30, 40))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(expected.astype(int) - np.asarray(image)).max() > 20


def test_sixteen_bits_stay_sixteen():
    grey = Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))
    checked = check_picture(saved(grey, "TIFF"), is_decoded=True)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(checked.content))), np.asarray(grey))


def test_a_conversion_turns_a_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    checked = check_picture(saved(picture(), "TIFF", exif=exif), is_decoded=True)
    assert checked.size_px == (40, 30)


def test_a_rotated_jpeg_keeps_its_bytes_and_has_its_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(picture(), "JPEG", exif=exif)
    checked = check_picture(content, is_decoded=True)
    assert checked.content == content and checked.size_px == (40, 30)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    stored = Image.open(io.BytesIO(check_picture(content, is_decoded=True).content))
    assert stored.convert("RGB").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty_file"),
        (b"<html>", "unsupported_format"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "unsupported_format"),
        (noise(64, 64)[:-400], "bad_image"),
        (noise(64, 64)[:20], "bad_image"),
        (encode_image(64, 64, kind="PNG")[:100], "bad_image"),
        (encode_image(64, 64, kind="BMP")[:500], "bad_image"),
        (saved(Image.new("1", (9000, 8000)), "PNG"), "too_many_pixels"),
        (saved(Image.new("1", (9000, 8000)), "BMP"), "too_many_pixels"),
        (saved(Image.new("F", (30, 40)), "TIFF"), "unsupported_mode"),
    ],
)
def test_what_cannot_be_trained_has_a_cause(content, cause):
    with pytest.raises(SkippedPicture) as caught:
        check_picture(content, is_decoded=True)
    assert caught.value.cause == cause
    assert caught.value.detail
