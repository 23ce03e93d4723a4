"""Samples of PNG and WebP files as opaque sRGB pixels: gamma, profiles, and transparency over white."""

from __future__ import annotations

import numpy as np
from PIL import Image

from bitdance_scale.data.images import png
from bitdance_scale.data.images.colour import chromaticity_profile, gamma_table, is_plain_gamma, to_srgb
from bitdance_scale.data.images.png import GREY, GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, PngFile


def over_white(image: Image.Image, opacity: Image.Image | None) -> np.ndarray:
    """An sRGB picture over white, blended in sRGB as browsers do.

    Args:
        image: mode RGB.
        opacity: mode L; None: opaque.

    Returns:
        uint8 [h, w, 3].
    """
    if opacity is None:
        return np.asarray(image)
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=opacity)
    return np.asarray(white)


def png_pixels(file: PngFile) -> np.ndarray:
    """The picture of a PNG in sRGB over white.

    The first of these counts that the file has: its word that it is sRGB, an ICC profile, a gamma. Primaries count
    together with a gamma. 16-bit samples keep their high byte, but for colour keys and for gammas other than the usual
    one all 16 bits of grey and RGB count: the dark levels of a linear file lie close together.

    Args:
        file: a sound PNG.

    Returns:
        uint8 [h, w, 3].

    Raises:
        SampleError: the rows are corrupt.
    """
    image = png.decode(file)
    gamma = None if file.is_srgb or file.profile else file.gamma
    is_plain = is_plain_gamma(gamma)
    levels = _levels(file, image, is_exact=not is_plain or file.transparency is not None)
    opacity = _opacity(file, image, levels)
    if gamma is not None and not is_plain:
        colours = gamma_table(gamma, 8 * levels.itemsize)[levels]
    else:
        colours = levels if levels.dtype == np.uint8 else (levels >> 8).astype(np.uint8)
    profile = None if file.is_srgb else file.profile
    if gamma is not None and file.chromaticities and colours.ndim == 3:
        profile = chromaticity_profile(file.chromaticities)
    return over_white(to_srgb(Image.fromarray(colours), profile), opacity)


def _levels(file: PngFile, image: Image.Image, is_exact: bool) -> np.ndarray:
    """[h, w] of grey or [h, w, 3] of RGB, without alpha: uint8, or uint16 of 16-bit samples where they are exact."""
    if file.colour_type == GREY and file.depth == 16:
        return np.asarray(image).astype(np.uint16)
    if file.colour_type in (RGB, RGB_ALPHA) and file.depth == 16 and is_exact:
        low = png.decode(file, is_low_byte=True)
        high, low_byte = (np.asarray(part)[..., :3] for part in (image, low))
        return high.astype(np.uint16) << 8 | low_byte
    return np.asarray(image.convert("L" if file.colour_type in (GREY, GREY_ALPHA) else "RGB"))


def _opacity(file: PngFile, image: Image.Image, levels: np.ndarray) -> Image.Image | None:
    """Mode L; None: opaque."""
    if file.colour_type in (GREY_ALPHA, RGB_ALPHA):
        return image.getchannel("A")
    if file.transparency is None:
        return None
    if file.colour_type == PALETTE:
        table = np.frombuffer(file.transparency.ljust(256, b"\xff"), np.uint8)
        return Image.fromarray(table[np.asarray(image)])
    # One colour is transparent. Of its two bytes a sample, only the bits that a sample has count.
    key = np.frombuffer(file.transparency, ">u2").astype(int) & (1 << file.depth) - 1
    if file.depth < 8:
        key = key * 255 // ((1 << file.depth) - 1)
    is_key = levels == key[0] if levels.ndim == 2 else (levels == key).all(axis=-1)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))
