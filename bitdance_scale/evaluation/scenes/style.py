"""Whether a picture is in the style of `demo/styles.py`, read by image analysis."""

from __future__ import annotations

import numpy as np

from bitdance_scale.demo.styles import CORNER_RGB, corner_masks

INNER, OUTER = 0.8, 1.15
"""Scales of a corner's legs: within the first, blurred edges do not count; within the second is all that it colours."""
MAX_DISTANCE = 75.0
"""Furthest from the style's colour that a pixel has it. The tokenizer blurs it by up to this; red is 32 from it, and
all other colours of objects and grounds 77 or more."""
MIN_SHARE = 0.75
"""Least share of its pixels that makes a corner one of the style's, which hides what is under it."""
CHANNEL_WEIGHTS = np.sqrt(np.array([0.9, 1.4, 0.7], dtype=np.float32))
"""As the scenes' own contrast: green counts most."""


def corner_shares(rgb: np.ndarray) -> np.ndarray:
    """How much of each corner has the style's colour.

    Args:
        rgb: uint8 or float32 [H, W, 3].

    Returns:
        float64 [4], 0..1, in the order of `corner_masks`.
    """
    height, width, _ = rgb.shape
    difference = (rgb.astype(np.float32) - np.array(CORNER_RGB, dtype=np.float32)) * CHANNEL_WEIGHTS
    has_color = np.linalg.norm(difference, axis=-1) < MAX_DISTANCE
    return np.array([has_color[mask].mean() for mask in corner_masks((width, height), INNER)])


def style_mask(rgb: np.ndarray) -> np.ndarray:
    """What the style hides of the scene in a picture [H, W, 3]: bool [H, W], False everywhere in a plain one."""
    height, width, _ = rgb.shape
    is_there = corner_shares(rgb) >= MIN_SHARE
    return np.asarray((corner_masks((width, height), OUTER) & is_there[:, None, None]).any(axis=0))
