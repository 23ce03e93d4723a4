"""Profiles and gammas against formulas, and what is ignored."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images import colour
from bitdance_scale.data.images.colour import chromaticity_profile, to_srgb
from tests.unit.data.images.png_writer import chunk, write_png
from tests.unit.data.images.sound_files import picture, saved, srgb_profile

# x and y of white, red, green and blue.
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
DISPLAY_P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def srgb_level(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: light 0 to 1 -> level 0 to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_light(level: np.ndarray) -> np.ndarray:
    """The same the other way round."""
    share = np.asarray(level) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """[3, 3], linear RGB of these primaries -> XYZ (SMPTE RP 177)."""
    points = np.array([(x / y, 1, (1 - x - y) / y) for x, y in np.reshape(chromaticities, (4, 2))])
    return points[1:].T * np.linalg.solve(points[1:].T, points[0])


def decoded(data: bytes) -> np.ndarray:
    height, width = Image.open(io.BytesIO(data)).size[::-1]
    return decode_image(data, (height, width), (height, width))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """A minimal ICC profile of version 2."""
    place, table, contents = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, place + len(contents), len(content))
        contents += content + bytes(-len(content) % 4)
    white = struct.pack(">3i", 63190, 65536, 54061)
    head = struct.pack(">I4sI4s4s4s", place + len(contents), bytes(4), 0x02400000, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + white + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + contents


def grey_profile(gamma: float) -> bytes:
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    return profile(b"GRAY", {b"wtpt": white, b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))})


def cmyk_profile() -> bytes:
    """Inks that only darken: lightness falls with the mean of C, M and Y and with K, and no colour is left."""
    corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lightness = (1 - corners[:, :3].mean(axis=1)) * (1 - corners[:, 3])
    lab = np.stack([255 * lightness, np.full(16, 128.0), np.full(16, 128.0)], -1).round().astype(np.uint8)
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).ravel()))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + lab.tobytes() + ramp * 3
    return profile(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def test_primaries_follow_the_formula() -> None:
    pixels = np.asarray(picture(24, 24, 3))
    wide = chromaticity_profile(DISPLAY_P3)
    assert wide is not None
    light = srgb_light(pixels) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(DISPLAY_P3)).T
    # LittleCMS keeps fifteen bits of the curves, and 8 bits come in and go out.
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        found = decoded(saved(Image.fromarray(pixels), kind, icc_profile=wide, **options))
        assert np.abs(found - srgb_level(light)).max() <= 2
    assert np.abs(pixels - srgb_level(light)).max() > 20
    jpeg = saved(Image.fromarray(pixels), "JPEG", icc_profile=wide, quality=100, subsampling=0)
    assert np.abs(decoded(jpeg) - srgb_level(light)).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_follows_its_profile(kind: str) -> None:
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(8, axis=0)
    found = decoded(saved(Image.fromarray(ramp), kind, icc_profile=grey_profile(1.0)))
    expected = srgb_level(np.arange(256) / 255)
    # A level of JPEG's is up to two off, and there dark levels of linear light lie up to 22 apart in sRGB.
    assert np.abs(found[0, :, 0] - expected).max() <= (22 if kind == "JPEG" else 1)
    assert (found == found[..., :1]).all()


def test_cmyk_follows_its_profile() -> None:
    inks = np.zeros((8, 64, 4), np.uint8)
    inks[..., 3] = np.linspace(0, 255, 64)
    image = Image.frombytes("CMYK", (64, 8), inks.tobytes())
    found = to_srgb(image, cmyk_profile())
    lightness = 100 * (1 - inks[0, :, 3] / 255)
    # CIE 1976: lightness -> luminance.
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    assert np.abs(np.asarray(found)[0, :, 1] - srgb_level(luminance)).max() <= 2
    data = saved(image, "JPEG", icc_profile=cmyk_profile(), quality=100)
    assert np.abs(decoded(data)[0, :, 1] - srgb_level(luminance)).max() <= 4
    assert np.array_equal(np.asarray(to_srgb(image, None)), np.asarray(image.convert("RGB")))


def test_what_is_srgb_stays_as_it_is() -> None:
    image = picture(16, 16, 5)
    pixels = np.asarray(image)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decoded(saved(image, kind, icc_profile=srgb_profile(), **options)), pixels)
    assert chromaticity_profile(SRGB) is None
    # The usual gamma of sRGB is not one of them: it moves no level by more than a screen's.
    for gamma, expected in ((45455, pixels), (45000, pixels), (0, pixels)):
        data = write_png(pixels, 8, 2, before=chunk(b"gAMA", struct.pack(">I", gamma)))
        assert np.array_equal(decoded(data), expected)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\x00" * 200,
        srgb_profile()[:150],
        srgb_profile()[:128] + bytes(400),
        grey_profile(1.0),
        cmyk_profile(),
        profile(b"RGB ", {}),
        profile(b"RGB ", {}, b"link"),
    ],
)
def test_a_profile_that_is_broken_or_of_other_samples_is_ignored(broken: bytes) -> None:
    image = picture(8, 8, 5)
    assert np.array_equal(np.asarray(to_srgb(image, broken)), np.asarray(image))
    data = write_png(np.asarray(image), 8, 2, before=chunk(b"iCCP", b"x\x00\x00" + zlib.compress(broken)))
    assert np.array_equal(decoded(data), np.asarray(image))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_linear_png(depth: int, colour_type: int) -> None:
    """A gamma of 1: samples are light."""
    num_samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    highest = (1 << depth) - 1
    samples = np.linspace(0, highest, 512 * num_samples).round().astype(int).reshape(8, 64, num_samples)
    if colour_type in (4, 6):
        samples[..., -1] = highest
    data = write_png(samples, depth, colour_type, before=chunk(b"gAMA", struct.pack(">I", 100_000)))
    levels = samples[..., :-1] if colour_type in (4, 6) else samples
    if (depth, colour_type) == (16, 4):
        levels, highest = levels >> 8, 255  # Pillow has no 16-bit grey with alpha.
    assert np.abs(decoded(data) - srgb_level(levels / highest)).max() <= 0.5 + 1e-6


def test_primaries_of_a_png_count_with_a_gamma() -> None:
    pixels = np.asarray(picture(24, 24, 3))
    chrm = chunk(b"cHRM", struct.pack(">8I", *(round(100_000 * value) for value in DISPLAY_P3)))
    gamma, srgb = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"sRGB", b"\x00")
    light = srgb_light(pixels) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(DISPLAY_P3)).T
    assert np.abs(decoded(write_png(pixels, 8, 2, before=gamma + chrm)) - srgb_level(light)).max() <= 2
    linear = chunk(b"gAMA", struct.pack(">I", 100_000))
    wide_linear = decoded(write_png(pixels, 8, 2, before=linear + chrm))
    light = (pixels / 255) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(DISPLAY_P3)).T
    assert np.abs(wide_linear - srgb_level(light)).mean() < 1
    profile_chunk = chunk(b"iCCP", b"x\x00\x00" + zlib.compress(srgb_profile()))
    for before in (chrm, srgb + linear + chrm, profile_chunk + linear + chrm, gamma + chunk(b"cHRM", bytes(32))):
        assert np.array_equal(decoded(write_png(pixels, 8, 2, before=before)), pixels)


def test_transparency_is_blended_in_srgb() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    assert (decoded(write_png(rgba, 8, 6)) == (227, 127, 127)).all()
    linear = chunk(b"gAMA", struct.pack(">I", 100_000))
    red = round(float(srgb_level(np.array(200 / 255))))
    assert (decoded(write_png(rgba, 8, 6, before=linear)) == (round((red * 128 + 255 * 127) / 255), 127, 127)).all()


def test_transforms_are_shared_by_threads_and_bounded() -> None:
    images = [picture(64, 64, seed) for seed in range(8)]
    points = np.linspace(0.6, 0.7, colour.MAX_KNOWN_PROFILES + 16)
    profiles = [chromaticity_profile((0.3127, 0.329, float(x), 0.3, 0.265, 0.69, 0.15, 0.06)) for x in points]
    assert None not in profiles
    few = profiles[:3]
    expected = [[np.asarray(to_srgb(image, known)) for image in images] for known in few]
    tasks = [(image, known) for _ in range(20) for image in range(len(images)) for known in range(len(few))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: np.asarray(to_srgb(images[task[0]], few[task[1]])), tasks))
    assert all(
        np.array_equal(pixels, expected[known][image]) for pixels, (image, known) in zip(found, tasks, strict=True)
    )
    for known in profiles:
        to_srgb(images[0], known)
    assert len(colour._transforms) == colour.MAX_KNOWN_PROFILES
