"""How the predictions of the diffusion head are distributed at fixed flow times (arXiv 2602.14041 Fig. 9).

Nothing confines the predictions to -1 and 1. That they gather there is what the head has learnt of binary tokens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

RANGE = 1.5
"""Predictions from -RANGE to RANGE are shown; what is beyond is counted."""
BINS_PER_UNIT = 21
"""An odd number of bins from -1 to 1 and back gives -1, 0 and 1 the middle of a bin each, not a border of two."""
NUM_BINS = round(2 * RANGE * BINS_PER_UNIT)
NEAR = 0.25
"""A prediction that is no farther than this from -1 or 1 is near a bit."""
NUM_COUNTS = NUM_BINS + 2
COLOUR, BIT_COLOUR = "#1f6fb4", "#7a7a7a"
PANEL_INCHES, DPI = (2.9, 3.0), 120
MAX_COLUMNS = 5


@dataclass(frozen=True)
class PredictionHistogram:
    """The predictions at one flow time.

    Attributes:
        time: t, 0 noise and 1 bits.
        counts: int64 [NUM_BINS], predictions in each bin from -RANGE to RANGE.
        num_outside: predictions beyond that range, or not finite.
        num_near: predictions within NEAR of -1 or 1.
    """

    time: float
    counts: np.ndarray
    num_outside: int
    num_near: int

    @classmethod
    def of_counts(cls, time: float, counts: np.ndarray) -> PredictionHistogram:
        """From the sum of results of `count_predictions`."""
        return cls(time, counts[:NUM_BINS], int(counts[NUM_BINS]), int(counts[NUM_BINS + 1]))

    @property
    def total(self) -> int:
        """All predictions."""
        return int(self.counts.sum()) + self.num_outside

    @property
    def shares(self) -> np.ndarray:
        """Share of all predictions in each bin, float64 [NUM_BINS]."""
        return self.counts / max(self.total, 1)

    @property
    def near_share(self) -> float:
        """Share of the predictions that are near a bit."""
        return self.num_near / max(self.total, 1)

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "time": self.time,
            "predictions": self.total,
            "near_share": self.near_share,
            "outside_share": self.num_outside / max(self.total, 1),
            "shares": self.shares.tolist(),
        }


def bin_edges() -> np.ndarray:
    """Borders of the bins, float64 [NUM_BINS + 1]."""
    return (np.arange(NUM_BINS + 1) - NUM_BINS / 2) / BINS_PER_UNIT


def count_predictions(values: torch.Tensor) -> torch.Tensor:
    """Counts predicted bits, on their device.

    Args:
        values: float, any shape.

    Returns:
        int64 [NUM_COUNTS]: of each bin, of those outside all bins, and of those near -1 or 1. Bins are closed below;
        the last one holds RANGE itself, too.
    """
    flat = values.flatten().double()
    is_inside = flat.abs() <= RANGE
    bins = ((torch.where(is_inside, flat, 0.0) + RANGE) * BINS_PER_UNIT).long().clamp(max=NUM_BINS - 1)
    counts = torch.bincount(torch.where(is_inside, bins, NUM_BINS), minlength=NUM_BINS + 1)
    return torch.cat([counts, ((flat.abs() - 1).abs() <= NEAR).sum()[None]])


def draw_histograms(histograms: Sequence[PredictionHistogram], title: str) -> bytes:
    """A PNG with a panel per flow time, all of the same scale.

    Args:
        histograms: at least one.
        title: of the picture.
    """
    # Imported late: it takes a second, which only the rank that draws should wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(histograms), MAX_COLUMNS)
    rows = -(-len(histograms) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, histogram in zip(panels, histograms, strict=False):
        axes.stairs(histogram.shares, bin_edges(), fill=True, color=COLOUR)
        for bit in (-1, 1):
            axes.axvline(bit, color=BIT_COLOUR, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(f"t = {histogram.time:g}", loc="left", fontsize=11)
        axes.set_title(f"{histogram.near_share:.1%} near a bit", loc="right", fontsize=9)
        axes.set_xlim(-RANGE, RANGE)
        axes.set_xticks([-1, 0, 1])
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(histograms) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("share of the predictions", fontsize=9)
    figure.supxlabel("predicted bit", fontsize=10)
    figure.suptitle(title, fontsize=12)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()
