"""Pictures for people: the curves of a run and grids of sampled images."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from bitdance_scale.observe.metrics import StepMetrics

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9722b", "#2f8f4e", "#7a7a7a"
DPI = 130
# Time constant of the smoothed curve, as a share of the logged steps.
SMOOTHED_SHARE = 1 / 40

# Smaller pictures are enlarged to about this side, by whole factors.
CELL_SIDE_PX = 256
MARGIN_PX = 12
FONT_PER_CELL = 1 / 16
LINE_HEIGHT = 1.3
TEXT_COLOUR = (30, 30, 30)


def loss_curve(metrics: Sequence[StepMetrics], path: Path) -> None:
    """Draws losses, gradient norm, learning rate and speed of a run as one PNG of four panels.

    The faint lines are the logged steps, the strong ones their moving average, which lags a little.

    Args:
        metrics: logged steps, oldest first; at least one.
        path: PNG to write; its folder is made, and a file there is replaced whole.
    """
    steps = np.array([point.step for point in metrics])
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (vision_axes, text_axes), (norm_axes, speed_axes) = figure.subplots(2, 2)

    _draw(vision_axes, steps, metrics, lambda point: point.loss, "total", ORANGE)
    _draw(vision_axes, steps, metrics, lambda point: point.loss_vision, "vision", BLUE)
    vision_axes.set_title("Flow loss, and the total with the weighted text loss")
    vision_axes.legend(frameon=False)

    _draw(text_axes, steps, metrics, lambda point: point.loss_text, "text", GREEN)
    text_axes.set_title("Text cross-entropy (nats per target)")

    _draw(norm_axes, steps, metrics, lambda point: point.grad_norm, "gradient norm", BLUE)
    norm_axes.set_yscale("log")
    norm_axes.set_title("Gradient norm before clipping (left), learning rate (right)")
    rate_axes = norm_axes.twinx()
    rate_axes.plot(steps, [point.lr for point in metrics], color=GREY, linestyle="--")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.spines["top"].set_visible(False)
    rate_axes.tick_params(colors=GREY)

    _draw(speed_axes, steps, metrics, lambda point: point.images_per_s, "images/s", GREEN)
    speed_axes.set_ylim(bottom=0)
    speed_axes.set_title("Images per second, all ranks")

    last = metrics[-1]
    figure.suptitle(f"{last.step:,} steps, {last.images:,} images, {last.tokens:,} tokens")
    _write(path, lambda target: figure.savefig(target, dpi=DPI, format="png"))


def image_grid(images: Sequence[np.ndarray], captions: Sequence[str], path: Path, columns: int) -> None:
    """Writes images in rows, each with its caption wrapped below it, as one PNG.

    Images may differ in size; one that fits several times into a cell is enlarged by the largest whole factor, each
    pixel a square, so that nothing is invented. None is shrunk.

    Args:
        images: uint8 [H, W, 3] each; at least one.
        captions: one per image.
        path: PNG to write; its folder is made, and a file there is replaced whole.
        columns: images per row.

    Raises:
        ValueError: no image, another count of captions, or an array that is no RGB image.
    """
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
        # Captions of a row stand on one line, whatever the heights of its pictures.
        text_top = top + max(pictures[i].height for i in row) + MARGIN_PX // 2
        for column, i in enumerate(row):
            left = MARGIN_PX + column * (width + MARGIN_PX)
            offset = (width - pictures[i].width) // 2
            sheet.paste(pictures[i], (left + offset, text_top - MARGIN_PX // 2 - pictures[i].height))
            for number, line in enumerate(texts[i]):
                middle = left + (width - font.getlength(line)) / 2
                pen.text((middle, text_top + number * line_px), line, fill=TEXT_COLOUR, font=font)
        top += height
    _write(path, lambda target: sheet.save(target, format="PNG"))


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fortieth of the points, its start not drawn towards 0.

    Args:
        values: float [n].

    Returns:
        float [n]; values that are not finite are left out, and NaN stands before the first finite one.
    """
    decay = 1 - 1 / max(1.0, len(values) * SMOOTHED_SHARE)
    total, weight = 0.0, 0.0
    smoothed = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        if weight > 0:
            smoothed[index] = total / weight
    return smoothed


def wrap_caption(caption: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Breaks a caption into lines of at most `width_px`, between words where possible."""
    # No character that shows is narrower than a quarter of the font's size.
    num_characters = max(1, min(len(caption), math.ceil(width_px / (font.size / 4))))
    while num_characters > 1:
        lines = textwrap.wrap(caption, num_characters)
        if all(font.getlength(line) <= width_px for line in lines):
            return lines
        num_characters -= 1
    return textwrap.wrap(caption, 1)


def _draw(
    axes: Axes,
    steps: np.ndarray,
    metrics: Sequence[StepMetrics],
    value: Callable[[StepMetrics], float],
    label: str,
    colour: str,
) -> None:
    """Plots one value: raw and faint, smoothed and strong."""
    values = np.array([value(point) for point in metrics], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    is_single = len(values) == 1
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label, marker="o" if is_single else None)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)


def _enlarge(image: np.ndarray) -> Image.Image:
    factor = max(1, CELL_SIDE_PX // max(image.shape[:2]))
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Saves aside and renames, so that a viewer never sees half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".writing")
    save(aside)
    os.replace(aside, path)
