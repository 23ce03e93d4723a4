"""What the page shows of a run that is under way or has ended, read from its folder."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance_scale.errors import BitDanceError
from bitdance_scale.evaluation.page import Table
from bitdance_scale.observe.benchmark_scores import BENCHMARKS_FILE, OVERALL
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE
from bitdance_scale.observe.overview import panel_pictures
from bitdance_scale.observe.run_record import CONFIG_FILE, RunRecord, read_run
from bitdance_scale.observe.sample_grids import sample_steps, samples_path
from bitdance_scale.observe.tokenizer_overview import is_tokenizer_run, read_tokenizer_run, tokenizer_overview
from bitdance_scale.train.run_lock import LOCK_FILE, STALE_S

READ_FILES = (METRICS_FILE, EVALUATION_FILE, BENCHMARKS_FILE, CONFIG_FILE)
MOST_OF_THE_TIME = 0.1
"""Share of the time that drawing the curves may take: a run may be training on the same processor."""
MAX_HELD_OUT_ROWS = 6

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change in ns of all files that are shown: changes whenever one of them does."""


@dataclass(frozen=True)
class Shown:
    """A picture of the page.

    Attributes:
        title: what it shows, also for those who cannot see it.
        png: its bytes.
    """

    title: str
    png: bytes


@dataclass(frozen=True)
class RunView:
    """A run at one moment.

    Attributes:
        name: of the run.
        summary: how far it is.
        problem: why nothing is shown of it; empty: there is something.
        panels: the curves.
        held_out: losses on held-out images, newest first; None: none yet.
        scores: of benchmarks, newest of each; None: none yet.
        stamp: of the files that this was read from.
    """

    name: str
    summary: str
    problem: str
    panels: Sequence[Shown]
    held_out: Table | None
    scores: Table | None
    stamp: Stamp


class RunWatch:
    """A run folder that is looked at again and again, by several visitors.

    Args:
        folder: of the run; it may be empty, or not be there yet.
        clock: seconds, for tests.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._view: RunView | None = None
        self._due_s = 0.0

    def look(self) -> RunView:
        """The run as it is, or as it was a moment ago if drawing it again so soon would take too much time."""
        with self._lock:
            if self._view is None or (self._clock() >= self._due_s and self._stamp() != self._view.stamp):
                begun_s = self._clock()
                self._view = self._read()
                ended_s = self._clock()
                self._due_s = ended_s + (ended_s - begun_s) * (1 / MOST_OF_THE_TIME - 1)
            return self._view

    @property
    def is_training(self) -> bool:
        """Whether a process holds the folder, as far as can be told from the clock of the file system."""
        try:
            return time.time() - (self.folder / LOCK_FILE).stat().st_mtime < STALE_S
        except OSError:
            return False

    def sample_steps(self) -> list[int]:
        """Steps of which there is a grid of samples, newest first."""
        return sample_steps(self.folder)[::-1]

    def sample_png(self, step: int) -> bytes | None:
        """The grid of samples of a step; None: it is not there any more."""
        try:
            return samples_path(self.folder, step).read_bytes()
        except FileNotFoundError:
            return None

    def _stamp(self) -> Stamp:
        found = []
        for name in READ_FILES:
            try:
                status = (self.folder / name).stat()
            except OSError:
                continue
            found.append((name, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _read(self) -> RunView:
        # Before the files are read: what is written meanwhile is another stamp.
        stamp = self._stamp()
        name = self.folder.resolve().name
        try:
            if is_tokenizer_run(self.folder):
                tokenizer = read_tokenizer_run(self.folder)
                page = Shown(f"Curves and reconstructions of {name}", tokenizer_overview(tokenizer))
                return RunView(tokenizer.name, tokenizer.summary(), "", [page], None, None, stamp)
            run = read_run(self.folder)
        except FileNotFoundError:
            problem = f"There is no {METRICS_FILE} in {self.folder} yet. It appears with the first logged step."
            return RunView(name, "no step logged yet", problem, [], None, None, stamp)
        except (BitDanceError, OSError, ValueError) as error:
            return RunView(name, "", f"The files of the run cannot be read: {error}", [], None, None, stamp)
        panels = [Shown(panel.title, _png(panel.pixels)) for panel in panel_pictures([run])]
        return RunView(run.name, run.summary(), "", panels, _held_out(run), _scores(run), stamp)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    # Plots have few colours: a palette makes them half as large, and nothing of them is seen to change.
    Image.fromarray(pixels).quantize(128).save(content, format="PNG")
    return content.getvalue()


def _held_out(run: RunRecord) -> Table | None:
    """The newest losses on held-out images."""
    if not run.evaluations:
        return None
    newest = [*reversed(run.evaluations)][:MAX_HELD_OUT_ROWS]
    sides = sorted({side for line in newest for side in line.vision_by_resolution})
    header = ["Step", "Flow loss", *(f"{side} px" for side in sides), "Text loss"]
    rows = [
        [
            f"{line.step:,}",
            f"{line.vision:.4g}",
            *(f"{line.vision_by_resolution[side]:.4g}" if side in line.vision_by_resolution else "" for side in sides),
            f"{line.text:.4g}",
        ]
        for line in newest
    ]
    return Table(header, rows)


def _scores(run: RunRecord) -> Table | None:
    """The newest value of every metric."""
    newest = {line.series: line for line in run.scores}
    if not newest:
        return None
    rows = [
        [
            f"{line.benchmark}: {line.metric}",
            f"{line.step:,}",
            f"{line.values[OVERALL]:.3g}",
            f"{line.low[OVERALL]:.3g} to {line.high[OVERALL]:.3g}",
            f"{line.num_images:,}",
        ]
        for line in newest.values()
    ]
    return Table(["Benchmark", "Step", "Score", "95 % interval", "Images"], rows)
