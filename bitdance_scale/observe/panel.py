"""One panel of a page of plots: its curves, range, ticks and legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

GREY = "#7a7a7a"
# Points between a panel and its title: a legend's row.
TITLE_PAD = 17
# Reach of the smoothing to either side, as a share of the logged steps.
SMOOTHED_SHARE = 1 / 60
SMALLEST_WEIGHT = 1e-6
# Most points of a curve; a panel is some 400 pixels wide.
MAX_POINTS = 1600
# Space above and below the curves, as a share of their range.
MARGIN = 0.06
# A range of values with a larger ratio is drawn on a logarithmic axis.
LOG_RATIO = 5.0


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draws a strong curve; a single point is marked."""
    axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(steps) == 1 else "")


def show_range(axes: Axes, curves: Iterable[Sequence[float] | np.ndarray]) -> None:
    """Shows the range of these values, on a logarithmic axis where it is wide."""
    values = np.concatenate([np.empty(0), *curves])
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() == values.max():
        return
    low, high = values.min(), values.max()
    if low <= 0 or high / low <= LOG_RATIO:
        margin = MARGIN * (high - low)
        axes.set_ylim(low - margin, high + margin)
        return
    margin = (high / low) ** MARGIN
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())


def show_from_zero(axes: Axes, least_top: float = 0.0) -> None:
    """Shows a panel's curves from 0 to a little above the highest."""
    top = max(axes.dataLim.intervaly[1], least_top)
    if math.isfinite(top) and top > 0:
        axes.set_ylim(0, (1 + MARGIN) * top)


def legend(axes: Axes, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Puts the legend into the row between title and panel, where no curve is."""
    axes.legend(
        handles,
        labels,
        ncols=max(1, len(labels)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        fontsize=8,
        frameon=False,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=0.9,
        borderpad=0,
        borderaxespad=0.4,
    )


def last_value(axes: Axes, text: str) -> None:
    """Writes the last value at the top right of a panel."""
    axes.set_title(text, loc="right", fontweight="bold", pad=TITLE_PAD)


def note(axes: Axes, text: str) -> None:
    """Writes into the middle of a panel why it is empty."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def finish(axes: Axes, borders: Sequence[int]) -> None:
    """Sets the ticks and frame of a panel with its curves, and draws vertical lines where stages begin."""
    if axes.get_yscale() == "linear" and len(axes.get_yticks()):
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(labelbottom=True, labelsize=8.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for border in borders:
        axes.axvline(border, color=GREY, linewidth=1, linestyle=":")


def short(value: float) -> str:
    """A number in few characters: 1,500, 20k, 2.5M, 0.25, 1.5e-3."""
    for least, factor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / factor:.3g}{unit}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the neighbours on both sides, so that it does not lag; weights fall exponentially with the distance.

    Args:
        values: float [n].

    Returns:
        float [n]; values that are not finite are left out, and a point without any finite value near it is NaN.
    """
    decay = 1 - 1 / max(1.0, len(values) * SMOOTHED_SHARE)
    is_finite = np.isfinite(values)
    known, counts = np.where(is_finite, values, 0.0), is_finite.astype(np.float64)
    # Each point is in the sum from the left and in the one from the right.
    total = _decaying_sum(known, decay) + _decaying_sum(known[::-1], decay)[::-1] - known
    weight = _decaying_sum(counts, decay) + _decaying_sum(counts[::-1], decay)[::-1] - counts
    smoothed = np.full(len(values), np.nan)
    # Far from any finite value the weight vanishes.
    return np.divide(total, weight, out=smoothed, where=weight > SMALLEST_WEIGHT)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points of a curve [n]: the lowest and the highest of each piece, in order."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    chosen = []
    for piece in np.array_split(np.arange(len(steps)), MAX_POINTS // 2):
        low, high = np.nan_to_num(values[piece], nan=np.inf), np.nan_to_num(values[piece], nan=-np.inf)
        chosen += sorted((piece[low.argmin()], piece[high.argmax()]))
    return steps[chosen], values[chosen]


def _decaying_sum(values: np.ndarray, decay: float) -> np.ndarray:
    """Float [n]: each value plus `decay` times the sum before it."""
    return np.fromiter(accumulate(values, lambda total, value: decay * total + value), np.float64, len(values))
