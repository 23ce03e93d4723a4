"""Draws one page about the training of a visual tokenizer: losses, held-out reconstruction, speed, pictures."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE
from bitdance_scale.observe.panel import (
    TITLE_PAD,
    draw_line,
    finish,
    last_value,
    legend,
    note,
    short,
    show_range,
    smooth,
)
from bitdance_scale.observe.run_record import CONFIG_FILE

PICTURES_FOLDER = "reconstructions"
"""Of the pictures of a run, `step_NNNNNNNN.png`."""
DPI = 110
NUM_COLUMNS = 4
PANEL_INCHES = (4.3, 3.2)
PICTURE_INCHES = 7.0
HEAD_INCHES, FOOT_INCHES = 0.95, 0.4
MARGINS = {"left": 0.035, "right": 0.99, "wspace": 0.2, "hspace": 0.35}
BLUE, FAINT = "#1f6fb4", 0.3
SERIES_COLOURS = "viridis"

PANELS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("Loss", ("loss",)),
    ("Pixels: L1, L2, edges", ("l1", "l2", "edge")),
    ("LPIPS and adversarial loss", ("lpips", "adversarial")),
    ("Entropy (nats): token, codebook", ("entropy_token", "entropy_codebook")),
    ("Discriminator: hinge, LeCam", ("hinge", "lecam")),
    ("Gradient norms", ("grad_norm", "discriminator_grad_norm")),
    ("Images per second", ("images_per_s",)),
)
HELD_OUT: Sequence[tuple[str, str]] = (
    ("Held out: PSNR (dB)", "psnr_db"),
    ("Held out: SSIM", "ssim"),
    ("Held out: share of codes in use", "code_share"),
)


@dataclass(frozen=True)
class TokenizerRun:
    """A run read from its folder, also one that is still going.

    Attributes:
        name: name of the run.
        metrics: logged steps, oldest first, each step once.
        evaluations: held-out evaluations, likewise.
        picture: its newest picture of originals over reconstructions; None: there is none yet.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    picture: Path | None = None

    def summary(self) -> str:
        """How far the run is, and how well it reconstructs."""
        if not self.metrics:
            return "no step logged yet"
        last = self.metrics[-1]
        text = f"{last['step']:,} steps, {last['images']:,} images"
        if self.evaluations:
            values = self.evaluations[-1]["psnr_db"]
            text += ", PSNR " + ", ".join(f"{value:.2f} dB at {size}" for size, value in values.items())
        return text


def read_tokenizer_run(run_folder: Path) -> TokenizerRun:
    """Reads the records of a run; a torn last line is left out.

    Raises:
        FileNotFoundError: there is no metrics file.
    """
    evaluations = run_folder / EVALUATION_FILE
    return TokenizerRun(
        run_folder.resolve().name,
        _records(run_folder / METRICS_FILE),
        _records(evaluations) if evaluations.exists() else [],
        max((run_folder / PICTURES_FOLDER).glob("step_*.png"), default=None),
    )


def is_tokenizer_run(run_folder: Path) -> bool:
    """Whether a run folder is of a tokenizer's training."""
    config = run_folder / CONFIG_FILE
    return config.is_file() and "autoencoder" in tomllib.loads(config.read_text(encoding="utf-8"))


def tokenizer_overview(run: TokenizerRun) -> bytes:
    """The page of a run as a PNG; its newest picture of reconstructions is below the plots."""
    reconstructions = Image.open(run.picture) if run.picture is not None else None
    panels = [panel for panel in PANELS if any(_series(run.metrics, key).any() for key in panel[1])]
    held_out = [panel for panel in HELD_OUT if any(panel[1] in record for record in run.evaluations)]
    num_rows = -(-(len(panels) + len(held_out)) // NUM_COLUMNS)
    plots_inches, picture_inches = num_rows * PANEL_INCHES[1], 0.0 if reconstructions is None else PICTURE_INCHES
    height = HEAD_INCHES + plots_inches + picture_inches
    figure = Figure(figsize=(NUM_COLUMNS * PANEL_INCHES[0], height))
    figure.suptitle(f"{run.name}: {run.summary()}", x=0.01, y=1 - 0.15 / height, ha="left", va="top", fontweight="bold")
    # Fixed margins: to find them, matplotlib would draw the page once more.
    plots = figure.add_gridspec(
        num_rows, NUM_COLUMNS, top=1 - HEAD_INCHES / height, bottom=(picture_inches + FOOT_INCHES) / height, **MARGINS
    )
    for number, (title, keys) in enumerate(panels):
        _draw_steps(figure.add_subplot(plots[divmod(number, NUM_COLUMNS)]), title, run.metrics, keys)
    for number, (title, key) in enumerate(held_out, start=len(panels)):
        _draw_held_out(figure.add_subplot(plots[divmod(number, NUM_COLUMNS)]), title, run.evaluations, key)
    if reconstructions is not None:
        axes = figure.add_axes((0.01, 0.0, 0.98, (picture_inches - HEAD_INCHES) / height), anchor="NW")
        axes.imshow(np.asarray(reconstructions), interpolation="lanczos")
        axes.set_axis_off()
        axes.set_title("Held-out images over their reconstructions", loc="left", fontweight="bold")
    FigureCanvasAgg(figure)
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=DPI)
    return page.getvalue()


def _draw_steps(axes: Axes, title: str, records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=TITLE_PAD)
    steps = _series(records, "step")
    shown = [key for key in keys if _series(records, key).any()]
    handles, curves = [], []
    for key, colour in zip(shown, _colours(len(shown)), strict=True):
        values = _series(records, key)
        axes.plot(steps, values, color=colour, alpha=FAINT, linewidth=0.8)
        curve = smooth(values)
        draw_line(axes, steps, curve, colour)
        handles.append(axes.lines[-1])
        curves.append(curve)
    show_range(axes, curves)
    if len(shown) > 1:
        legend(axes, handles, shown)
    else:
        last_value(axes, short(curves[0][-1]))
    finish(axes, ())


def _draw_held_out(axes: Axes, title: str, records: Sequence[Mapping[str, Any]], key: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=TITLE_PAD)
    found = [record for record in records if record.get(key)]
    if not found:
        note(axes, "not measured yet")
        return
    sizes = [*found[-1][key]]
    steps, handles, curves = _series(found, "step"), [], []
    for size, colour in zip(sizes, _colours(len(sizes)), strict=True):
        curves.append(np.array([record[key].get(size, np.nan) for record in found], dtype=float))
        draw_line(axes, steps, curves[-1], colour)
        handles.append(axes.lines[-1])
    show_range(axes, curves)
    legend(axes, handles, sizes)
    finish(axes, ())


def _colours(number: int) -> list[str]:
    if number == 1:
        return [BLUE]
    return [to_hex(colour) for colour in colormaps[SERIES_COLOURS](np.linspace(0.1, 0.8, number))]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """float64 [n]; what a record lacks, or has no number for, is NaN, and 0 where no record has it."""
    values = np.array([np.nan if record.get(key) is None else record[key] for record in records], dtype=float)
    return values if np.isfinite(values).any() else np.zeros(len(records))


def _records(path: Path) -> list[Mapping[str, Any]]:
    """Each step once, its last record."""
    found: dict[int, Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["step"]] = record
    return [found[step] for step in sorted(found)]
