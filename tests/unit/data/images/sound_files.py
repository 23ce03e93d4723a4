"""Sound image files of the kinds that are found in the wild, each with the picture that it should give."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from tests.unit.data.images.png_writer import chunk, write_png

# 12 x 16 pixels of a slope, with arithmetic coding, which Pillow reads but does not write: sequential and progressive.
ARITHMETIC = (
    (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
        "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
        "T09PT09PT0//yQARCAAMABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwCv+W6ZQhPByLDMcRHStKJ9+I8iEZNy"
        "fT8qwP/Z"
    ),
    (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
        "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
        "T09PT09PT0//ygARCAAMABADASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAUlYCVOnJv/MAAQQBf/aAAgBAQABBQIQYGGw"
        "/8wABBEF/9oACAEDAQE/ARRCgP/MAAQRBf/aAAgBAgEBPwESDoD/zAAEEAX/2gAIAQEABj8CwP/MAAQQBf/aAAgBAQABPyHxqP/a"
        "AAwDAQACAAMAAAAQzP/MAAQRBf/aAAgBAwEBPxDo/8wABBEF/9oACAECAQE/EOD/zAAEEAX/2gAIAQEAAT8Q1RyZ/uz/2Q=="
    ),
)
SIDES_PX = ((1, 1), (1, 9), (8, 8), (17, 3), (31, 33), (48, 65))


class SoundFile(NamedTuple):
    """A file, the uint8 [h, w, 3] that it should give, and by how much a level may differ."""

    name: str
    data: bytes
    pixels: np.ndarray
    tolerance: int = 0


def picture(height: int, width: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise."""
    numbers = np.random.default_rng(seed)
    coarse = numbers.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), int)
    noisy = (smooth + numbers.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """uint8 [h, w, 3], the whole picture as Pillow decodes it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def segment(marker: int, content: bytes) -> bytes:
    """One JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def srgb_profile() -> bytes:
    """An ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_segments(profile: bytes, part_bytes: int) -> bytes:
    """An ICC profile in several segments, the last one first."""
    parts = [profile[start : start + part_bytes] for start in range(0, len(profile), part_bytes)]
    heads = [b"ICC_PROFILE\x00" + bytes([number + 1, len(parts)]) for number in range(len(parts))]
    return b"".join(segment(0xE2, head + part) for head, part in list(zip(heads, parts, strict=True))[::-1])


def jpegs() -> Iterator[SoundFile]:
    """Every way in which pixels are coded, and every kind of metadata. Two builds of libjpeg give the same pixels."""
    for number, (height, width) in enumerate(SIDES_PX):
        for mode in ("RGB", "L", "CMYK"):
            image = picture(height, width, number, mode)
            for is_progressive in (False, True):
                for options in ({}, {"restart_marker_blocks": 2}, {"quality": 97, "optimize": True}):
                    for subsampling in (0, 1, 2) if mode == "RGB" else (0,):
                        data = saved(image, "JPEG", progressive=is_progressive, subsampling=subsampling, **options)
                        name = f"{height}x{width} {mode} {is_progressive} {subsampling} {options}"
                        yield SoundFile(name, data, by_pillow(data))
        ycck = simplejpeg.encode_jpeg(np.array(picture(height, width, number, "CMYK")), 90, "CMYK", "420")
        yield SoundFile(f"{height}x{width} YCCK", ycck, by_pillow(ycck))
        for subsampling in ("440", "411", "422"):
            data = simplejpeg.encode_jpeg(np.array(picture(height, width, number)), 90, "RGB", subsampling)
            yield SoundFile(f"{height}x{width} {subsampling}", data, by_pillow(data))
        stored_rgb = saved(picture(height, width, number), "JPEG", keep_rgb=True)
        yield SoundFile(f"{height}x{width} stored as RGB", stored_rgb, by_pillow(stored_rgb))
    yield from _jpegs_with_metadata()


def _jpegs_with_metadata() -> Iterator[SoundFile]:
    for is_progressive in (False, True):
        data = saved(picture(40, 56, 7), "JPEG", progressive=is_progressive)
        other = saved(picture(30, 20, 8), "JPEG")
        pixels = by_pillow(data)
        frame = data.index(b"\xff\xc2" if is_progressive else b"\xff\xc0")
        thumbnail = np.asarray(picture(5, 6, 9)).tobytes()
        exif = saved(picture(8, 8, 1), "JPEG", exif=_exif())
        variants = {
            "trailing bytes": data + b"\x00" * 700 + b"\xff\xd8",
            "another picture behind it": data + other,
            "fill bytes": data[:2] + b"\xff" * 9 + data[2:],
            "comments": data[:2] + segment(0xFE, b"\xff\xd9" * 32_000) * 40 + data[2:],
            "JFIF thumbnail": data[:2]
            + segment(0xE0, b"JFIF\x00\x01\x02\x00\x00\x01\x00\x01\x06\x05" + thumbnail)
            + data[20:],
            "thumbnail in EXIF": data[:2]
            + segment(0xE1, b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00" + exif)
            + data[2:],
            "JFIF of another version": data[:11] + b"\x02" + data[12:],
            "profile in parts": data[:2] + profile_segments(srgb_profile(), 100) + data[2:],
            "part of a profile": data[:2] + profile_segments(srgb_profile(), 300)[:-318] + data[2:],
            "broken profile": data[:2] + profile_segments(b"\x00\x01\x02" * 70, 500) + data[2:],
            "comment before the frame": data[:frame] + segment(0xFE, b"hello") + data[frame:],
            "restart marker at the end": data[:-2] + b"\xff\xd0\xff\xd9",
            "bare markers": data[:2] + b"\xff\x01" + data[2:],
        }
        if not is_progressive:
            scan = data.index(b"\xff\xda")
            header_bytes = int.from_bytes(data[scan + 2 : scan + 4], "big")
            place = scan + 2 + header_bytes - 3
            variants["scan parameters at zero"] = data[:place] + bytes(3) + data[place + 3 :]
        for name, variant in variants.items():
            yield SoundFile(f"{name} {is_progressive}", variant, pixels)
    for number, text in enumerate(ARITHMETIC):
        data = base64.b64decode(text)
        yield SoundFile(f"arithmetic {number}", data, by_pillow(data))
    mpo = saved(picture(20, 30, 3), "MPO", save_all=True, append_images=[picture(20, 30, 4)])
    yield SoundFile("MPO", mpo, by_pillow(mpo))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    return exif


def pngs() -> Iterator[SoundFile]:
    """All colour types and depths, interlaced and not, with and without transparency; the samples give the pixels."""
    numbers = np.random.default_rng(0)
    for colour_type, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for depth in depths:
            for height, width in SIDES_PX:
                for is_interlaced in (False, True):
                    for is_transparent in (False, True) if colour_type in (0, 2, 3) else (False,):
                        name = f"{height}x{width} type {colour_type}, {depth} bits {is_interlaced} {is_transparent}"
                        yield _png(name, numbers, (height, width), colour_type, depth, is_interlaced, is_transparent)
    samples = numbers.integers(0, 256, (20, 30, 3))
    profile = chunk(b"iCCP", b"x\x00\x00" + zlib.compress(srgb_profile()))
    text = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(b"\x00" * 3_000_000))
    plain = write_png(samples, 8, 2)
    variants = {
        "trailing bytes": plain + b"\x00" * 100,
        "many small chunks": write_png(samples, 8, 2, idat_bytes=7),
        "one chunk": write_png(samples, 8, 2, idat_bytes=1 << 20),
        "empty chunk of rows": plain.replace(chunk(b"IEND", b""), chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        "sRGB": write_png(samples, 8, 2, before=chunk(b"sRGB", b"\x00")),
        "profile": write_png(samples, 8, 2, before=profile),
        "usual gamma": write_png(samples, 8, 2, before=chunk(b"gAMA", struct.pack(">I", 45455))),
        "large text": write_png(samples, 8, 2, before=text),
        "unknown chunk": write_png(samples, 8, 2, before=chunk(b"abCd", b"123")),
        "suggested palette": write_png(samples, 8, 2, before=chunk(b"PLTE", bytes(30))),
        "damaged profile": write_png(samples, 8, 2, before=chunk(b"iCCP", b"x\x00\x00abc")),
        "transparency of a wrong length": write_png(samples, 8, 2, before=chunk(b"tRNS", b"\x00")),
    }
    for name, data in variants.items():
        yield SoundFile(name, data, samples.astype(np.uint8), 2 if name == "profile" else 0)


def _png(
    name: str,
    numbers: np.random.Generator,
    size_px: tuple[int, int],
    colour_type: int,
    depth: int,
    is_interlaced: bool,
    is_transparent: bool,
) -> SoundFile:
    highest = (1 << depth) - 1
    num_samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    samples = numbers.integers(0, highest + 1, (*size_px, num_samples))
    opacity = np.ones(size_px)
    before = b""
    if colour_type == 3:
        palette = numbers.integers(0, 256, (highest + 1, 3))
        alphas = numbers.integers(0, 256, max(1, (highest + 1) // 2))
        before = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        colours = palette[samples[..., 0]]
        if is_transparent:
            before += chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
            opacity = np.concatenate([alphas, np.full(highest + 1 - len(alphas), 255)])[samples[..., 0]] / 255
    else:
        num_colours = 1 if colour_type in (0, 4) else 3
        levels = samples[..., :num_colours]
        if is_transparent:
            key = levels[0, 0]
            # Only its high byte is the colour's: not transparent.
            if depth == 16:
                samples[-1, -1, 0] ^= 1
            before = chunk(b"tRNS", key.astype(">u2").tobytes())
            opacity = 1.0 - (levels == key).all(axis=-1)
        elif colour_type in (4, 6):
            opacity = (samples[..., -1] >> (8 if depth == 16 else 0)) / 255
        eight = levels >> 8 if depth == 16 else levels * 255 // highest
        colours = np.broadcast_to(eight, (*size_px, 3))
    blended = np.round(colours * opacity[..., None] + 255 * (1 - opacity[..., None]))
    data = write_png(samples, depth, colour_type, is_interlaced, before)
    return SoundFile(name, data, blended.astype(np.uint8), 1 if is_transparent or colour_type in (4, 6) else 0)


def webps() -> Iterator[SoundFile]:
    """Lossy, lossless, with alpha, metadata and several frames."""
    for number, (height, width) in enumerate(SIDES_PX):
        for options in ({"lossless": True}, {"quality": 60}, {"quality": 95, "method": 6}, {"exif": _exif()}):
            data = saved(picture(height, width, number), "WEBP", **options)
            yield SoundFile(f"{height}x{width} {options}", data, by_pillow(data))
        rgba = picture(height, width, number)
        rgba.putalpha(picture(height, width, number + 1, "L"))
        for options in ({"lossless": True, "exact": True}, {"quality": 80}):
            data = saved(rgba, "WEBP", **options)
            found = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), float)
            opacity = found[..., 3:] / 255
            blended = np.round(found[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
            yield SoundFile(f"{height}x{width} alpha {options}", data, blended, 1)
    data = saved(picture(20, 30, 1), "WEBP", icc_profile=srgb_profile(), exif=_exif())
    yield SoundFile("profile", data, by_pillow(data), 2)
    yield SoundFile("trailing bytes", data + b"\x00" * 99, by_pillow(data), 2)
    frames = [picture(20, 30, seed) for seed in range(3)]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield SoundFile("animation", data, np.asarray(frames[0]))
