"""Draws one page about a run or several, from the files in their folders: losses, optimiser, speed and data."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from bitdance_scale.observe.benchmark_scores import OVERALL
from bitdance_scale.observe.metrics import Evaluation, Record, StepMetrics
from bitdance_scale.observe.panel import (
    GREY,
    TITLE_PAD,
    draw_line,
    finish,
    last_value,
    legend,
    note,
    short,
    show_from_zero,
    show_range,
    smooth,
    thin,
)
from bitdance_scale.observe.run_record import RunRecord, each_once

GIB = 2**30
WIDTH_INCHES, ROW_INCHES, DPI = 17, 3.5, 120
NUM_COLUMNS, NUM_ROWS = 4, 3
MARGINS = {"left": 0.042, "right": 0.992, "wspace": 0.24, "hspace": 0.32}
BOTTOM_INCHES = 0.55
# Around the axes of a panel lie what belongs to it: its label at the left, its title above, its ticks below.
PANEL_ROOM_INCHES = (0.68, 0.1, 0.5, 0.25)
HEADER_LINE_INCHES = 0.25
PICTURES_GAP_INCHES = 0.2
BLUE, GREEN, ORANGE, RED = "#1f6fb4", "#2f8f4e", "#d9722b", "#c22f2f"
# Of runs drawn over each other; the series of a run differ in lightness.
RUN_COLOURS = (BLUE, ORANGE, GREEN, "#8a4fb0", RED, "#8c6239", "#d0559f", GREY)
LIGHTEST = 0.35
RESOLUTION_COLOURS, TIME_COLOURS = "viridis", "plasma"
# A panel of losses may cut off their start: this share of the logged steps, and the evaluation of the untrained model
# if its loss is this many times the later ones, given this many of them.
START_SHARE = 0.02
MIN_LATER, DWARFING = 3, 2.0
# With more evaluations than this, their points are not marked.
MAX_MARKED = 40


def overview(runs: Sequence[RunRecord], *, one_after_another: bool = False) -> bytes:
    """Draws the page of some runs and returns the PNG.

    In the panels of training, the faint line shows the logged steps and the strong line their mean over neighbours.
    Panels of a single run name its last values. The start of a long run may lie above the panels of losses. Runs with
    scores of benchmarks have a fourth row, with a panel for each metric. Below the panels of a single run that started
    from other weights are its newest pictures, beside those of the start.

    Args:
        runs: at least one, from `read_run`.
        one_after_another: the runs are stages, each of which begins where the one before it ended; otherwise they are
            drawn over each other, each in its own colour.
    """
    figure, _ = _draw_page(runs, one_after_another)
    page = io.BytesIO()
    figure.savefig(page, format="png")
    return page.getvalue()


@dataclass(frozen=True)
class PanelPicture:
    """One panel of the page by itself, for a screen on which the page does not fit.

    Attributes:
        title: what it shows.
        pixels: uint8 [H, W, 3].
    """

    title: str
    pixels: np.ndarray


def panel_pictures(runs: Sequence[RunRecord], *, one_after_another: bool = False) -> list[PanelPicture]:
    """The panels of the page of some runs, cut out of it, in its order; arguments as `overview`."""
    figure, panels = _draw_page(runs, one_after_another)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3]
    height, width = page.shape[:2]
    left, right, above, below = (round(inches * DPI) for inches in PANEL_ROOM_INCHES)
    pictures = []
    for axes in panels:
        box = axes.get_position()
        top, bottom = round((1 - box.y1) * height) - above, round((1 - box.y0) * height) + below
        columns = slice(max(0, round(box.x0 * width) - left), round(box.x1 * width) + right)
        pictures.append(PanelPicture(axes.get_title(loc="left"), page[max(0, top) : bottom, columns].copy()))
    return pictures


def _draw_page(runs: Sequence[RunRecord], one_after_another: bool) -> tuple[Figure, list[Axes]]:
    """The page of some runs, and its panels in order."""
    is_overlaid = len(runs) > 1 and not one_after_another
    offsets = [0]
    for run in runs[:-1]:
        offsets.append(offsets[-1] + run.num_steps if one_after_another else 0)
    tracks = [
        _Track(run, offset, number, RUN_COLOURS[number % len(RUN_COLOURS)] if is_overlaid else None)
        for number, (run, offset) in enumerate(zip(runs, offsets, strict=True))
    ]
    series = list(dict.fromkeys(line.series for run in runs for line in run.scores))
    num_rows = NUM_ROWS + math.ceil(len(series) / NUM_COLUMNS)
    pictures = _pictures(runs[0].pictures) if len(runs) == 1 and runs[0].pictures else None
    pictures_inches = 0 if pictures is None else len(pictures) / DPI + PICTURES_GAP_INCHES
    height_inches = num_rows * ROW_INCHES + pictures_inches
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI)
    FigureCanvasAgg(figure)
    header_inches = _head(figure, tracks, one_after_another)
    # Fixed margins: to find them, matplotlib would draw the page twice more.
    top, bottom = 1 - (header_inches + 0.5) / height_inches, (BOTTOM_INCHES + pictures_inches) / height_inches
    figure.subplots_adjust(top=top, bottom=bottom, **MARGINS)
    panels = figure.subplots(num_rows, NUM_COLUMNS, sharex=True)
    _draw_losses(panels[0], tracks)
    _draw_optimiser(panels[1, 0], panels[1, 1], tracks)
    _draw_speed(panels[1, 2], panels[1, 3], panels[2, 0], tracks)
    _draw_resources(panels[2, 1], panels[2, 2], panels[2, 3], tracks)
    score_panels = panels[NUM_ROWS:].ravel()
    for axes, name in zip(score_panels, series, strict=False):
        _draw_scores(axes, tracks, name)
    for axes in score_panels[len(series) :]:
        axes.remove()
    panels = panels.ravel()[: NUM_ROWS * NUM_COLUMNS + len(series)]
    for axes in panels:
        finish(axes, offsets[1:] if one_after_another else [])
    for axes in panels[-NUM_COLUMNS:]:
        axes.set_xlabel("optimiser step")
    if len(runs) == 1 and runs[0].num_steps == 0:
        panels[0].set_xlim(0, 1)
    if pictures is not None:
        figure.figimage(pictures, xo=(WIDTH_INCHES * DPI - pictures.shape[1]) // 2, yo=0, origin="upper")
    return figure, list(panels)


def _pictures(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], a grid at its own size, or reduced to the width of the page."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((WIDTH_INCHES * DPI, image.height), Image.Resampling.LANCZOS)
    return np.asarray(image)


@dataclass(frozen=True)
class _Track:
    """A run as it lies on the page: where its steps begin, its number, and its colour where runs are overlaid."""

    run: RunRecord
    offset: int
    number: int
    hue: str | None

    def curve(self, records: Sequence[Record], value: Callable[[Record], float]) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values [n] of some records; values that are not finite are NaN."""
        values = np.array([value(record) for record in records], dtype=np.float64)
        values[~np.isfinite(values)] = np.nan
        return np.array([record.step for record in records], dtype=np.int64) + self.offset, values


def _draw_losses(panels: Sequence[Axes], tracks: Sequence[_Track]) -> None:
    flow, text, by_resolution, by_time = panels
    _training(flow, tracks, "Flow loss, training", "flow loss", lambda point: point.loss_vision, BLUE, ".3f")
    _training(text, tracks, "Text loss, training", "nats per text token", lambda point: point.loss_text, GREEN, ".3f")
    show_range(
        flow, [_after_start(track.curve(track.run.metrics, lambda point: point.loss_vision)[1]) for track in tracks]
    )
    show_range(
        text,
        [
            *(_after_start(track.curve(track.run.metrics, lambda point: point.loss_text)[1]) for track in tracks),
            *(track.curve(track.run.evaluations[1:], lambda line: line.text)[1] for track in tracks),
        ],
    )
    for track in tracks:
        steps, values = track.curve(track.run.evaluations, lambda line: line.text)
        colour = track.hue or ORANGE
        size = 6 if len(steps) <= MAX_MARKED else 3
        text.plot(steps, values, "D", color=colour, markeredgecolor="white", markersize=size, zorder=5)
    if any(track.run.evaluations for track in tracks):
        text.set_title("Text loss, training and held out", loc="left", pad=TITLE_PAD)
        colours = (GREY, GREY) if tracks[0].hue else (GREEN, ORANGE)
        marks = [Line2D([], [], color=colours[0]), Line2D([], [], color=colours[1], marker="D", linestyle="")]
        legend(text, marks, ["training", "held out"])

    sides = sorted({side for track in tracks for line in track.run.evaluations for side in line.vision_by_resolution})
    _held_out(
        by_resolution,
        tracks,
        "Held-out flow loss by size (px)",
        [str(side) for side in sides],
        [_loss_of_resolution(side) for side in sides],
        RESOLUTION_COLOURS,
    )
    parts = max((len(line.vision_by_time) for track in tracks for line in track.run.evaluations), default=0)
    _held_out(
        by_time,
        tracks,
        "Held-out flow loss by flow time",
        [f"{part / parts:.2g}\N{EN DASH}{(part + 1) / parts:.2g}" for part in range(parts)],
        [_loss_of_time(part) for part in range(parts)],
        TIME_COLOURS,
    )


def _loss_of_resolution(side_px: int) -> Callable[[Evaluation], float]:
    return lambda line: line.vision_by_resolution.get(side_px, math.nan)


def _loss_of_time(part: int) -> Callable[[Evaluation], float]:
    """The loss in a part of the flow time; NaN where an evaluation has fewer parts."""
    return lambda line: line.vision_by_time[part] if part < len(line.vision_by_time) else math.nan


def _images_of_resolution(side_px: int) -> Callable[[StepMetrics], float]:
    return lambda point: point.images_by_resolution.get(side_px, 0)


def _draw_optimiser(norm: Axes, rate: Axes, tracks: Sequence[_Track]) -> None:
    title = "Gradient norm before clipping"
    _training(norm, tracks, title, "gradient norm", lambda point: point.grad_norm, BLUE, ".3g")
    curves = [track.curve(track.run.metrics, lambda point: point.grad_norm)[1] for track in tracks]
    show_range(norm, [*curves, [track.run.clip_norm or math.nan for track in tracks]])
    marks = {}
    for track in tracks:
        # Each run has its own row at the top of the panel.
        height = 0.97 - 0.05 * track.number * (track.hue is not None)
        steps, norms = track.curve(track.run.metrics, lambda point: point.grad_norm)
        clip_norm = track.run.clip_norm
        if clip_norm is not None and len(steps):
            limit = norm.plot([steps[0], steps[-1]], [clip_norm] * 2, "--", color=track.hue or GREY, linewidth=1)
            marks["limit" if len(tracks) > 1 else f"limit {clip_norm:g}"] = limit[0]
            clipped = steps[norms > clip_norm]
            if len(clipped):
                heights = np.full(len(clipped), height)
                where = norm.get_xaxis_transform()
                mark = norm.plot(clipped, heights, "|", color=track.hue or ORANGE, transform=where)[0]
                share = f" ({len(clipped) / len(steps):.1%} of steps)" if len(tracks) == 1 else ""
                marks["clipped" + share] = mark
        skipped = np.diff([0, *(point.skipped_steps for point in track.run.metrics)]) > 0
        if skipped.any():
            heights, where = np.full(skipped.sum(), height), norm.get_xaxis_transform()
            marks["skipped (not finite)"] = norm.plot(
                steps[skipped], heights, "x", transform=where, color=RED, markeredgewidth=2, clip_on=False, zorder=6
            )[0]
    if marks:
        legend(norm, [*marks.values()], [*marks.keys()])

    rate.set_title("Learning rate", loc="left", pad=TITLE_PAD)
    rate.set_ylabel("learning rate")
    for track in tracks:
        steps, values = track.curve(track.run.metrics, lambda point: point.lr)
        draw_line(rate, *thin(steps, values), track.hue or ORANGE)
        if len(tracks) == 1 and len(values):
            last_value(rate, short(values[-1]))
    show_from_zero(rate)


def _draw_speed(images: Axes, tokens: Axes, mfu: Axes, tracks: Sequence[_Track]) -> None:
    _training(images, tracks, "Images per second, all ranks", "images / s", lambda point: point.images_per_s, GREEN)
    _training(tokens, tracks, "Tokens per second, all ranks", "tokens / s", lambda point: point.tokens_per_s, GREEN)
    if any(point.mfu is not None for track in tracks for point in track.run.metrics):
        unit = "% of the devices' peak"
        _training(mfu, tracks, "MFU", unit, lambda point: 100 * _or_nan(point.mfu), GREEN, ".1f", " %")
    else:
        # No empty panel for a number that is unknown on this device.
        _training(mfu, tracks, "Time of a step", "seconds", lambda point: point.step_s, GREEN, ".3g", " s")
        mfu.text(
            0.98,
            0.97,
            "MFU: the device's peak is not known",
            transform=mfu.transAxes,
            fontsize=8,
            color=GREY,
            ha="right",
            va="top",
        )
    for axes in (images, tokens, mfu):
        show_from_zero(axes)


def _draw_resources(wait: Axes, memory: Axes, resolutions: Axes, tracks: Sequence[_Track]) -> None:
    title = "Waiting for data"
    _training(
        wait, tracks, title, "% of a step", lambda point: 100 * point.data_wait_s / point.step_s, ORANGE, ".1f", " %"
    )
    # One percent must not look like much.
    show_from_zero(wait, 5.0)

    memory.set_title("Memory, fullest rank", loc="left", pad=TITLE_PAD)
    memory.set_ylabel("GiB")
    for track in tracks:
        steps, values = track.curve(track.run.metrics, lambda point: point.memory_bytes / GIB)
        draw_line(memory, *thin(steps, values), track.hue or BLUE)
        if len(tracks) == 1 and len(values):
            last_value(memory, f"{values[-1]:.3g} GiB")
    show_from_zero(memory)

    skipped_samples = sum(track.run.metrics[-1].skipped_samples for track in tracks if track.run.metrics)
    resolutions.set_title("Images seen by size (px)", loc="left", pad=TITLE_PAD)
    if skipped_samples:
        left_out = f"{skipped_samples:,} could not be read"
        resolutions.text(0.98, 0.03, left_out, transform=resolutions.transAxes, fontsize=8, color=GREY, ha="right")
    resolutions.set_ylabel("images")
    sides = sorted(
        {side for track in tracks for point in track.run.metrics[-1:] for side in point.images_by_resolution}
    )
    for index, side in enumerate(sides):
        for track in tracks:
            steps, values = track.curve(track.run.metrics, _images_of_resolution(side))
            colour = _series_colour(track.hue, index, len(sides), RESOLUTION_COLOURS)
            draw_line(resolutions, *thin(steps, values), colour)
    _series_legend(resolutions, tracks, [str(side) for side in sides], RESOLUTION_COLOURS)
    show_from_zero(resolutions)
    if not sides:
        note(resolutions, "none yet")


def _draw_scores(axes: Axes, tracks: Sequence[_Track], series: str) -> None:
    """Draws the overall value of a metric over its interval."""
    axes.set_title(series.replace("/", ": "), loc="left", pad=TITLE_PAD)
    axes.set_ylabel("score")
    curves = []
    for track in tracks:
        lines = each_once([line for line in track.run.scores if line.series == series])
        steps, values = track.curve(lines, lambda line: line.values[OVERALL])
        _, low = track.curve(lines, lambda line: line.low[OVERALL])
        _, high = track.curve(lines, lambda line: line.high[OVERALL])
        colour = track.hue or BLUE
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, values, color=colour, marker="o" if len(steps) <= MAX_MARKED else "", linewidth=1.8)
        curves += [values, low, high]
        if len(tracks) == 1 and len(values):
            last_value(axes, format(values[-1], ".3g"))
    if any(curve.min(initial=np.inf) == 0 for curve in curves):
        # A share that has not left zero yet.
        show_from_zero(axes, 0.05)
    else:
        show_range(axes, curves)


def _training(
    axes: Axes,
    tracks: Sequence[_Track],
    title: str,
    unit: str,
    value: Callable[[StepMetrics], float],
    colour: str,
    form: str = ",.3g",
    suffix: str = "",
) -> None:
    """Draws a value of the logged steps: raw and faint, smoothed and strong, with the last one at the top right."""
    axes.set_title(title, loc="left", pad=TITLE_PAD)
    axes.set_ylabel(unit)
    for track in tracks:
        steps, values = track.curve(track.run.metrics, value)
        smoothed = smooth(values)
        axes.plot(*thin(steps, values), color=track.hue or colour, alpha=0.28, linewidth=0.7)
        draw_line(axes, *thin(steps, smoothed), track.hue or colour)
        if len(tracks) == 1 and len(values) and math.isfinite(smoothed[-1]):
            last_value(axes, format(smoothed[-1], form if abs(smoothed[-1]) < 1000 else ",.0f") + suffix)
    if not any(track.run.metrics for track in tracks):
        note(axes, "none yet")


def _held_out(
    axes: Axes,
    tracks: Sequence[_Track],
    title: str,
    labels: Sequence[str],
    values: Sequence[Callable[[Evaluation], float]],
    palette: str,
) -> None:
    """Draws series of the evaluations, one per label."""
    axes.set_title(title, loc="left", pad=TITLE_PAD)
    axes.set_ylabel("flow loss")
    for track in tracks:
        marker = "o" if len(track.run.evaluations) <= MAX_MARKED else ""
        for index, value in enumerate(values):
            colour = _series_colour(track.hue, index, len(values), palette)
            axes.plot(
                *track.curve(track.run.evaluations, value), color=colour, marker=marker, markersize=4, linewidth=1.8
            )
    show_range(axes, [curve for track in tracks for curve in _without_untrained(track, values)])
    _series_legend(axes, tracks, labels, palette)
    if not any(track.run.evaluations for track in tracks):
        note(axes, "no evaluation")


def _after_start(values: np.ndarray) -> np.ndarray:
    return values[math.ceil(START_SHARE * len(values)) :] if len(values) >= 1 / START_SHARE else values


def _without_untrained(track: _Track, values: Sequence[Callable[[Evaluation], float]]) -> list[np.ndarray]:
    """The series of a run's evaluations, without the one before its first step if it dwarfs the others."""
    lines = track.run.evaluations
    later = lines[1:]
    if len(later) >= MIN_LATER and lines[0].step == 0 and lines[0].vision > DWARFING * max(x.vision for x in later):
        lines = later
    return [track.curve(lines, value)[1] for value in values]


def _series_legend(axes: Axes, tracks: Sequence[_Track], labels: Sequence[str], palette: str) -> None:
    hue = "#404040" if tracks[0].hue else None
    colours = [_series_colour(hue, index, len(labels), palette) for index in range(len(labels))]
    handles = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours]
    if handles:
        legend(axes, handles, labels)


def _series_colour(hue: str | None, index: int, count: int, palette: str) -> str:
    """A colour of the palette, or the run's own colour in the lightness of the series."""
    place = index / (count - 1) if count > 1 else 1.0
    if hue is None:
        return to_hex(colormaps[palette](0.85 * place))
    strength = LIGHTEST + (1 - LIGHTEST) * place
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(hue))
    return to_hex((red, green, blue))


def _head(figure: Figure, tracks: Sequence[_Track], one_after_another: bool) -> float:
    """Writes the names and lengths of the runs above the panels; returns the height used, in inches."""
    names = [f"{track.run.name}: {track.run.summary()}" for track in tracks]
    if len(tracks) > 1 and not one_after_another:
        handles = [Line2D([], [], color=track.hue, linewidth=3) for track in tracks]
        num_columns = 1 if len(tracks) <= 3 else 2
        figure.legend(handles, names, loc="upper center", ncols=num_columns, frameon=False, fontsize=11)
        return 0.15 + HEADER_LINE_INCHES * math.ceil(len(tracks) / num_columns)
    if one_after_another:
        names = [f"from step {track.offset:,} on, {name}" for track, name in zip(tracks, names, strict=True)]
    top = 1 - 0.1 / figure.get_figheight()
    figure.suptitle("\n".join(names), fontsize=14 if len(names) == 1 else 11, y=top, va="top")
    return 0.15 + HEADER_LINE_INCHES * len(names)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
