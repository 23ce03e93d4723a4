"""From the colours of a file to sRGB.

ICC profiles are followed with the perceptual intent, as browsers do: it is the one table that every profile with
tables has, and for profiles of matrices it is the same as the relative colorimetric one. Black is mapped to black. A
profile that is broken or belongs to another kind of samples is ignored, as browsers do too.
"""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from PIL import Image

MAX_KNOWN_PROFILES = 64
"""Transforms that are kept; the one that was not used for the longest time goes first."""

# A profile that moves no colour by more than this is sRGB in other words.
_SRGB_TOLERANCE = 2
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_DEVICES = ("scnr", "mntr", "prtr", "spac")
_USUAL_GAMMA = 0.45455
# Of white, red, green and blue: BT.709 and D65, the primaries of sRGB.
_SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# What rounding to three digits leaves of them.
_CHROMATICITY_TOLERANCE = 0.002
# As libpng: a smaller difference of the exponents cannot be seen.
_GAMMA_TOLERANCE = 0.05

_lock = threading.Lock()
_transforms: OrderedDict[tuple[bytes, str], Any] = OrderedDict()


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture as sRGB (mode RGB); safe to use from several threads.

    Args:
        image: mode L, RGB or CMYK.
        profile: ICC profile of its samples; None: they are sRGB, or for CMYK the ink model of Pillow.
    """
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    # LittleCMS keeps its state on the stack of the call, so threads share the transform.
    return transform.apply(image)


def is_plain_gamma(gamma: float | None) -> bool:
    """Whether samples with this exponent (PNG's gAMA, or None) are taken for sRGB."""
    return gamma is None or abs(gamma / _USUAL_GAMMA - 1) < _GAMMA_TOLERANCE


def gamma_table(gamma: float, num_bits: int) -> np.ndarray:
    """uint8 [2 ** num_bits], the sRGB level of samples that are light to the power of `gamma`."""
    light = np.linspace(0, 1, 1 << num_bits) ** (1 / gamma)
    level = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * level).astype(np.uint8)


def chromaticity_profile(chromaticities: tuple[float, ...]) -> bytes | None:
    """An ICC profile of these primaries with the curve of sRGB; None if they are those of sRGB, or no primaries.

    Args:
        chromaticities: x and y of white, red, green and blue, as in PNG's cHRM.
    """
    if np.abs(np.subtract(chromaticities, _SRGB_CHROMATICITIES)).max() <= _CHROMATICITY_TOLERANCE:
        return None
    return _matrix_profile(chromaticities)


def _transform(profile: bytes, mode: str) -> Any:
    """A transform to sRGB; None if the profile is sRGB or is ignored."""
    key = hashlib.blake2b(profile, digest_size=16).digest(), mode
    with _lock:
        if key in _transforms:
            _transforms.move_to_end(key)
            return _transforms[key]
    transform = _build(profile, mode)
    with _lock:
        _transforms[key] = transform
        while len(_transforms) > MAX_KNOWN_PROFILES:
            _transforms.popitem(last=False)
    return transform


def _build(profile: bytes, mode: str) -> Any:
    # Most files have no profile, and a command that decodes nothing should not load the library.
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space, device = source.profile.xcolor_space.strip(), source.profile.device_class
        if space != _SPACES[mode] or device not in _DEVICES:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            # LittleCMS may simplify the way of colours, which is fast and exact enough. For grey it would interpolate
            # between few levels, and all 256 are computed once anyway.
            ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0),
        )
        probe = _probe(mode)
        if probe is not None:
            moved = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"))
            if np.abs(moved).max() <= _SRGB_TOLERANCE:
                return None
            if mode == "L":
                return _GreyTable(np.asarray(transform.apply(probe))[0])
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform


class _GreyTable:
    """A transform of grey.

    Args:
        colours: uint8 [256, 3], the colour of every level.
    """

    def __init__(self, colours: np.ndarray) -> None:
        self._colours = colours

    def apply(self, image: Image.Image) -> Image.Image:
        """A picture of mode L as RGB."""
        return Image.fromarray(self._colours[np.asarray(image)])


@functools.cache
def _probe(mode: str) -> Image.Image | None:
    """Colours by which sRGB is recognised: all greys, and a grid. No CMYK profile is sRGB."""
    if mode == "CMYK":
        return None
    greys = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(greys[None])
    levels = np.linspace(0, 255, 7).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    return Image.fromarray(np.concatenate([greys[:, None].repeat(3, axis=1), grid])[None])


@functools.lru_cache(maxsize=MAX_KNOWN_PROFILES)
def _matrix_profile(chromaticities: tuple[float, ...]) -> bytes | None:
    """ICC.1:2010, a display profile of three primaries."""
    white, *primaries = np.reshape(chromaticities, (4, 2))
    try:
        columns = np.stack([_xyz(primary) for primary in primaries], axis=1)
        columns = columns * np.linalg.solve(columns, _xyz(white))
    except (ArithmeticError, np.linalg.LinAlgError):
        return None
    # To the white D50 of the profile, with the cone responses of Bradford.
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    columns = np.linalg.inv(cones) @ np.diag(cones @ d50 / (cones @ _xyz(white))) @ cones @ columns
    if not np.isfinite(columns).all() or np.abs(columns).max() > 4:
        return None

    def fixed(values: Any) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * float(value))) for value in values)

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed((2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(d50)}
    for name, column in zip("rgb", columns.T, strict=True):
        tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(column)
        tags[f"{name}TRC".encode()] = curve
    place, table, contents = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, place + len(contents), len(content))
        contents += content
    head = struct.pack(">I4sI4s4s4s", place + len(contents), bytes(4), 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(d50) + bytes(48)
    return head + table + contents


def _xyz(chromaticity: np.ndarray) -> np.ndarray:
    x, y = map(float, chromaticity)
    return np.array([x / y, 1.0, (1 - x - y) / y])
