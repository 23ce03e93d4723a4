"""Grids of sampled images with their captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bitdance_scale.atomic_files import replacing

# Smaller pictures are enlarged to about this side, by whole factors.
CELL_SIDE_PX = 256
MARGIN_PX = 12
FONT_PER_CELL = 1 / 16
LINE_HEIGHT = 1.3
TEXT_COLOUR = (30, 30, 30)


def image_grid(images: Sequence[np.ndarray], captions: Sequence[str], path: Path, columns: int) -> None:
    """Writes images in rows, each with its caption wrapped below it, as one PNG.

    Images may differ in size. An image that fits into a cell several times is enlarged by the largest whole factor, so
    that every pixel becomes a square and nothing is invented. No image is shrunk.

    Args:
        images: uint8 [H, W, 3] each; at least one.
        captions: one per image.
        path: PNG to write; its folder is made, and an existing file is replaced atomically.
        columns: images per row.

    Raises:
        ValueError: there is no image, not one caption per image, or an array that is no RGB image.
    """
    # It takes a second to import, which only the rank that draws should wait for.
    from matplotlib.font_manager import findfont

    if not images or len(images) != len(captions) or columns < 1:
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions in {columns} columns: need one caption per image"
        )
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    pictures = [_enlarge(image) for image in images]
    width = max(CELL_SIDE_PX, *(picture.width for picture in pictures))
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=round(width * FONT_PER_CELL))
    line_px = round(font.size * LINE_HEIGHT)
    texts = [wrap_caption(caption, font, width) for caption in captions]

    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [
        max(pictures[i].height for i in row) + max(len(texts[i]) for i in row) * line_px + 2 * MARGIN_PX for row in rows
    ]
    num_columns = min(columns, len(images))
    sheet = Image.new("RGB", (num_columns * (width + MARGIN_PX) + MARGIN_PX, sum(heights) + MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        # The captions of a row begin at the same height, whatever the heights of its pictures.
        text_top = top + max(pictures[i].height for i in row) + MARGIN_PX // 2
        for column, i in enumerate(row):
            left = MARGIN_PX + column * (width + MARGIN_PX)
            offset = (width - pictures[i].width) // 2
            sheet.paste(pictures[i], (left + offset, text_top - MARGIN_PX // 2 - pictures[i].height))
            for number, line in enumerate(texts[i]):
                middle = left + (width - font.getlength(line)) / 2
                pen.text((middle, text_top + number * line_px), line, fill=TEXT_COLOUR, font=font)
        top += height
    with replacing(path) as aside:
        sheet.save(aside, format="PNG")


def wrap_caption(caption: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Breaks a caption into lines of at most `width_px`, between words where possible."""
    # No visible character is narrower than a quarter of the font size.
    num_characters = max(1, min(len(caption), math.ceil(width_px / (font.size / 4))))
    while num_characters > 1:
        lines = textwrap.wrap(caption, num_characters)
        if all(font.getlength(line) <= width_px for line in lines):
            return lines
        num_characters -= 1
    return textwrap.wrap(caption, 1)


def _enlarge(image: np.ndarray) -> Image.Image:
    factor = max(1, CELL_SIDE_PX // max(image.shape[:2]))
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))
