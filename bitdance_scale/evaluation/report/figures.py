"""Values with intervals as pictures: by category, and over a setting."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.report.sweep import Curve

DPI = 110
MAX_CATEGORIES = 30
"""Of a picture; a table has them all."""
_COLOURS = ("#1f6fb4", "#d9722b", "#2f8f4e", "#8a4fb0", "#c22f2f", "#8c6239", "#d0559f", "#7a7a7a")
_MARKERS = "osD^v"
_WIDTH_INCHES = 9.0
_ROW_INCHES = 0.17
_PANEL_INCHES = (3.6, 2.9)
_PANELS_PER_ROW = 3
_LEGEND_INCHES = 0.24
_LEGEND_CHARACTERS = 100
_MAX_LABEL = 60
_MAX_NAME = 32
# Values over a larger ratio may lie on a logarithmic axis.
_MIN_LOG_RATIO = 4.0


def draw_categories(values: Mapping[str, Mapping[str, Estimate]]) -> bytes:
    """A row per category with a point and an interval for each model, as PNG.

    Args:
        values: by model, then by category; the overall value is set apart.
    """
    models = list(values)
    categories = list(dict.fromkeys(name for found in values.values() for name in found))
    shown = categories[:MAX_CATEGORIES]
    height = _ROW_INCHES * len(shown) * (len(models) + 1.2)
    legend_inches = _LEGEND_INCHES * _num_rows(models) if len(models) > 1 else 0.0
    figure = _figure(_WIDTH_INCHES, height + legend_inches + 0.8)
    axes = figure.subplots()
    for number, model in enumerate(models):
        offset = ((number + 0.5) / len(models) - 0.5) * len(models) / (len(models) + 1.2)
        rows = [row for row, name in enumerate(shown) if name in values[model]]
        found = [values[model][shown[row]] for row in rows]
        _errors(axes, [row + offset for row in rows], found, number, is_across=True)
    axes.set_yticks(range(len(shown)), [_cut(name, _MAX_NAME) for name in shown])
    for label, name in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if name == OVERALL else "normal")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    for border in range(1, len(shown)):
        axes.axhline(border - 0.5, color="#d8d8d8", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    left_out = len(categories) - len(shown)
    more = f"; {left_out} more categories are in the table" if left_out else ""
    axes.set_xlabel(f"value, and the interval of 95 % over prompts{more}")
    return _saved(figure, [axes], models if len(models) > 1 else [])


def draw_sweep(setting: str, panels: Mapping[str, Sequence[Curve]]) -> bytes:
    """A panel per value over a setting, with intervals where there are some, as PNG.

    Args:
        setting: what the horizontal axis is called.
        panels: by name of the value, its curves; those of the same label have the same colour in all panels.
    """
    labels = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    num_columns = min(_PANELS_PER_ROW, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    legend_inches = _LEGEND_INCHES * _num_rows(labels)
    width = max(_PANEL_INCHES[0] * num_columns, 5.4)
    figure = _figure(width, _PANEL_INCHES[1] * num_rows + legend_inches + 0.1)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        for curve in curves:
            number = labels.index(curve.label)
            _errors(axes, curve.positions, curve.values, number, is_across=False)
        _set_positions(axes, sorted({position for curve in curves for position in curve.positions}))
        axes.set_title(_cut(name, _MAX_NAME), fontsize=10, loc="left")
        axes.set_xlabel(_plain(setting))
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return _saved(figure, list(grid.flat), labels)


def is_logarithmic(positions: Sequence[float]) -> bool:
    """Whether rising values, such as 10, 25, 50, 100, lie more evenly on a logarithmic axis than on a linear one."""
    if len(positions) < 3 or positions[0] <= 0 or positions[-1] / positions[0] < _MIN_LOG_RATIO:
        return False
    unevenness = []
    for places in (np.array(positions), np.log(positions)):
        gaps = np.diff(places)
        unevenness.append(gaps.std() / gaps.mean())
    return bool(unevenness[1] < unevenness[0])


def _errors(
    axes: Axes,
    places: Sequence[float],
    found: Sequence[Estimate | float],
    number: int,
    *,
    is_across: bool,
) -> None:
    """Points with their intervals: across the picture, a row each, or over a setting, joined by a line."""
    values = [one.value if isinstance(one, Estimate) else one for one in found]
    bounds = [(one.low, one.high) if isinstance(one, Estimate) else (one, one) for one in found]
    # The value of the prompts as they are may lie outside the quantiles of the resamples.
    reach = [
        [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    colour, marker = _style(number)
    errors = reach if any(isinstance(one, Estimate) for one in found) else None
    axes.errorbar(
        values if is_across else places,
        places if is_across else values,
        xerr=errors if is_across else None,
        yerr=None if is_across else errors,
        fmt=marker if is_across else f"{marker}-",
        color=colour,
        markersize=4.5,
        linewidth=1.5,
        elinewidth=1.3,
        capsize=2.5,
    )


def _style(number: int) -> tuple[str, str]:
    """Colour and marker of a model or line by its number."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def _set_positions(axes: Axes, positions: Sequence[float]) -> None:
    if is_logarithmic(positions):
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = positions[0], positions[-1]
    places = np.log(positions) if axes.get_xscale() == "log" else np.array(positions)
    # Labels that would touch the one before are left out.
    room, last = 0.09 * max(places[-1] - places[0], 1e-9), -math.inf
    kept = []
    for position, place in zip(positions, places, strict=True):
        if place - last >= room:
            kept.append(position)
            last = place
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.set_xticklabels([f"{position:g}" for position in kept])
    if axes.get_xscale() == "log":
        axes.set_xlim(low * (low / high) ** 0.08, high * (high / low) ** 0.08)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, panels: Sequence[Axes], labels: Sequence[str]) -> bytes:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    if labels:
        styles = [_style(number) for number in range(len(labels))]
        figure.legend(
            [Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.5) for colour, marker in styles],
            [_cut(label, _MAX_LABEL) for label in labels],
            loc="outside lower left",
            ncols=math.ceil(len(labels) / _num_rows(labels)),
            frameon=False,
            fontsize=9,
        )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _num_rows(labels: Sequence[str]) -> int:
    """Rows of the legend."""
    longest = max(len(_cut(label, _MAX_LABEL)) for label in labels) + 6
    return math.ceil(len(labels) / max(1, _LEGEND_CHARACTERS // longest))


def _cut(text: str, length: int) -> str:
    return _plain(text if len(text) <= length else f"{text[: length - 3]}...")


def _plain(text: str) -> str:
    """Without formulas, which matplotlib reads between dollar signs."""
    return text.replace("$", r"\$")
