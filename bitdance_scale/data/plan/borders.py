"""What of a stored image is the picture, where img2dataset padded it to a square (`resize_mode=border`).

LAION-400M at 256 px is stored so: the image is scaled to the square along its longer side, and white is added on both
sides of the other. The original size tells how much.
"""

from __future__ import annotations

import numpy as np

from bitdance_scale.data.index.index import Index

_INSET_PX = 1
"""Cropped away beyond the border: compression smears it by a pixel."""


def content_px(index: Index, samples: np.ndarray | slice, has_borders: bool) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of what of each stored image is the picture, int [n] each.

    Args:
        index: the data set.
        samples: positions in it.
        has_borders: whether the images were padded; else, and where the original size is not known, all is picture.
    """
    height, width = index.height_px[samples], index.width_px[samples]
    if not has_borders:
        return height, width
    original = index.original_height_px[samples].astype(np.int64), index.original_width_px[samples].astype(np.int64)
    is_known = (height == width) & (np.minimum(*original) > 0) & (original[0] != original[1])
    longest = np.where(is_known, np.maximum(*original), 1)
    sides = []
    for stored, side in zip((height, width), original, strict=True):
        # As img2dataset rounds: halves to the even neighbour.
        scaled = np.rint(side * (stored / longest)).astype(np.int64)
        inside = np.maximum(np.where(scaled < stored, scaled - 2 * _INSET_PX, stored), 1)
        sides.append(np.where(is_known, inside, stored).astype(np.int32))
    return sides[0], sides[1]
