"""A picture of images over their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

TILE_PX = 112
NUM_COLUMNS = 10
LABEL_PX, GAP_PX, LINE_PX = 74, 6, 2


@dataclass(frozen=True)
class Pairs:
    """Images of one size and their reconstructions; at most `NUM_COLUMNS` of them are shown.

    Attributes:
        size: what is written beside the originals.
        label: what is written beside the reconstructions.
        originals, decoded: uint8 [H, W, 3] each.
    """

    size: str
    label: str
    originals: Sequence[np.ndarray]
    decoded: Sequence[np.ndarray]


def draw_pairs(rows: Sequence[Pairs]) -> Image.Image:
    """Two lines per row: originals, and below them what the bits give back; enlarged without smoothing."""
    line_px = TILE_PX + LINE_PX
    row_px = 2 * line_px - LINE_PX + GAP_PX
    picture = Image.new("RGB", (LABEL_PX + NUM_COLUMNS * line_px, len(rows) * row_px + LINE_PX), "white")
    pen = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        for line, (label, tiles) in enumerate((("original", row.originals), (row.label, row.decoded))):
            y = number * row_px + line * line_px
            pen.text((4, y + TILE_PX // 2 - 8), f"{row.size}\n{label}", "black")
            for column, tile in enumerate(tiles[:NUM_COLUMNS]):
                enlarged = Image.fromarray(tile).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
                picture.paste(enlarged, (LABEL_PX + column * line_px, y))
    return picture
