"""Styles of demo scenes that no data set of the demo has: what a fine-tuning can be seen to learn.

A style lies over a scene and leaves its objects, their colours and places as they are, so that a styled picture can be
judged by the caption of its scene. `corners`: a vermilion photo corner in each corner of the picture.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from bitdance_scale.demo.shards import STYLES

CORNER_RGB = (200, 60, 20)
"""None of the scenes' colours; of those that were tried, the demo's tokenizer keeps it best."""
CORNER_LEG = 0.25
"""Legs of a corner's triangle, as a share of the picture's shorter side."""


def styled(image: Image.Image, style: str) -> Image.Image:
    """A copy of an RGB picture in one of `shards.STYLES`."""
    assert style in STYLES, style
    pixels = np.array(image.convert("RGB"))
    pixels[corner_masks(image.size).any(axis=0)] = CORNER_RGB
    return Image.fromarray(pixels)


def corner_masks(size_px: tuple[int, int], scale: float = 1.0) -> np.ndarray:
    """Where the photo corners of a picture are, or would be.

    Args:
        size_px: (width, height) of the picture.
        scale: of the legs.

    Returns:
        bool [4, height, width]: top left, top right, bottom left, bottom right.
    """
    width, height = size_px
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    leg = scale * CORNER_LEG * min(size_px)
    return np.stack([a + b < leg for b in (y, height - y) for a in (x, width - x)])
