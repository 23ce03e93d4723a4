"""A picture of a plan: memory against time, a point for every legal layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitdance_scale.planning.layouts import name_of
from bitdance_scale.planning.plan import GIB, Prediction, StagePlan

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666")
MARKERS = {"none": "o", "selective": "s", "full": "^"}
# Layouts that take longer than this many times the fastest are left out.
SLOWEST = 4.0
INCHES, DPI = (9.0, 5.5), 130


def draw_plan(plan: StagePlan, file: Path) -> None:
    """Writes the picture as PNG: colour is `parallel.tensor`, shape `parallel.recompute`, hollow does not fit."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        tensors = sorted({item.parallel.tensor for item in [*plan.ranked, *plan.too_large]})
        colours = {tensor: COLOURS[place % len(COLOURS)] for place, tensor in enumerate(tensors)}
        fastest = min(item.time.total for item in [*plan.ranked, *plan.too_large])
        for items, is_filled in ((plan.too_large, False), (plan.ranked, True)):
            _points(axes, [item for item in items if item.time.total <= SLOWEST * fastest], colours, is_filled)
        usable = plan.machine.usable_bytes / GIB
        axes.axvline(usable, color="#999999", linewidth=1, linestyle="--")
        axes.annotate(
            "usable",
            (usable, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color="#777777",
        )
        if plan.ranked:
            best = plan.ranked[0]
            axes.annotate(
                name_of(best.parallel),
                (best.memory.needed / GIB, best.time.total),
                xytext=(0, -14),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_xlabel("GiB on the fullest rank (bitdance memory)")
        axes.set_ylabel("seconds of a step, predicted")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (20, 50, 200, 500) else "")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{plan.config.run.name} on {plan.num_gpus} x {plan.machine.name}", loc="left")
        axes.legend(handles=_legend(colours), fontsize=8, frameon=False, loc="upper right")
        figure.savefig(file)


def _points(axes: Axes, items: Sequence[Prediction], colours: dict[int, str], is_filled: bool) -> None:
    for item in items:
        colour = colours[item.parallel.tensor]
        axes.plot(
            item.memory.needed / GIB,
            item.time.total,
            MARKERS[item.parallel.recompute],
            markersize=5,
            markeredgecolor=colour,
            markerfacecolor=colour if is_filled else "none",
            alpha=0.8 if is_filled else 0.4,
        )


def _legend(colours: dict[int, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=f"tensor={tensor}")
        for tensor, colour in colours.items()
    ]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="#555555", label=f"recompute={name}")
        for name, marker in MARKERS.items()
    ]
    return [
        *handles,
        Line2D([], [], marker="o", linestyle="", color="#555555", markerfacecolor="none", label="does not fit"),
    ]
