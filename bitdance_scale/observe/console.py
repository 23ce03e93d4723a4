"""What a run prints and logs: log files, the progress on rank 0 and the loss table at the end."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from bitdance_scale.atomic_files import is_storage_fault
from bitdance_scale.credentials import hide_credentials
from bitdance_scale.errors import printable
from bitdance_scale.observe.metrics import StepMetrics
from bitdance_scale.observe.write_faults import WarningClock

PACKAGE = "bitdance_scale"
FILE_FORMAT = "%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s"
# Seconds between plain progress lines: frequent in a short run, once a minute in a long one.
SHORTEST_INTERVAL_S = 10.0
LONGEST_INTERVAL_S = 60.0
INTERVALS_PER_ELAPSED = 60
# Logged steps over which the speed for the remaining time is averaged.
NUM_SPEED_POINTS = 20
NUM_TABLE_RANGES = 10
TABLE_COLUMNS = ("steps", "images", "loss", "vision", "text", "grad norm", "lr", "images/s")


def setup_logging(run_folder: Path, rank: int) -> None:
    """Routes this process's log messages and Python warnings; call it once per process.

    Rank 0 writes this package's messages and all libraries' warnings to `log.txt` in the run folder and to standard
    output. Every other rank writes its warnings to its own file, such as `logs/rank_00001.txt`, because ranks on
    several nodes would lose lines in a shared one; the file appears with the first warning. Its errors also go to
    standard error. Every line of a file names its rank. Credentials of a URL, such as a library may warn about, are
    hidden.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        file = _LogFile(run_folder / "log.txt", encoding="utf-8")
        console: logging.Handler = _ConsoleHandler()
        console.setFormatter(_ConsoleFormatter())
    else:
        (run_folder / "logs").mkdir(exist_ok=True)
        file = _LogFile(run_folder / "logs" / f"rank_{rank:05d}.txt", encoding="utf-8", delay=True)
        file.setLevel(logging.WARNING)
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.ERROR)
        console.setFormatter(_HidingFormatter(f"[rank {rank}] %(message)s"))
    file.setFormatter(_HidingFormatter(FILE_FORMAT.format(rank=rank)))
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.addHandler(file)
    root.addHandler(console)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    logging.captureWarnings(True)


class _Seldom(logging.Handler):
    """A handler whose storage may be full or failing: it says so on standard error, seldom and without a traceback."""

    clock = WarningClock()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not is_storage_fault(error):
            super().handleError(record)
        elif self.clock.is_due((type(self), error.errno)):
            # Where standard error cannot be written either, nobody can be told.
            with contextlib.suppress(OSError):
                print(f"warning: the log cannot be written ({error}); training goes on", file=sys.stderr, flush=True)


class _LogFile(_Seldom, logging.FileHandler):
    """A log file. What could not be written stays in its buffer, and is written with the next line that can be."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ConsoleHandler(_Seldom):
    """Writes to standard output, above a progress bar and not across it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            self.handleError(record)


class _HidingFormatter(logging.Formatter):
    """A formatter that hides credentials, and writes what UTF-8 cannot say as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_credentials(printable(super().format(record)))


class _ConsoleFormatter(_HidingFormatter):
    """The bare message; from warnings on, with the level in front."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


class ConsoleProgress:
    """Shows the progress of a run on rank 0: a bar on a terminal, elsewhere a plain line now and then.

    Args:
        num_steps: steps of the whole run.
        resumed_step: step from which the run resumes, 0 for a fresh start.
        stream: where to write; None for standard output.
    """

    def __init__(self, num_steps: int, resumed_step: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._num_steps = num_steps
        self._seconds_per_step: deque[float] = deque(maxlen=NUM_SPEED_POINTS)
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=resumed_step,
                file=self._stream,
                ncols=shutil.get_terminal_size().columns,
                nrows=shutil.get_terminal_size().lines,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(
        self,
        step: int,
        loss: float,
        parts: Mapping[str, float],
        *,
        grad_norm: float,
        images_per_s: float,
        step_s: float,
    ) -> None:
        """Shows a logged step.

        Args:
            step: optimiser steps taken.
            loss: the loss that is differentiated.
            parts: name -> loss it is made of; may be empty.
            grad_norm: global gradient norm before clipping.
            images_per_s: images per second of all ranks together.
            step_s: seconds per optimiser step; decides the remaining time.
        """
        self._seconds_per_step.append(step_s)
        speed = f"{images_per_s:.3g} images/s, ETA {self.remaining(step)}"
        if self._bar is not None:
            # tqdm's own measure is 0 in a terminal that does not report its size.
            self._bar.ncols = shutil.get_terminal_size().columns
            self._bar.set_description_str(f"loss {loss:.4f}", refresh=False)
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now_s = time.monotonic()
        if now_s < self._next_line_s and step < self._num_steps:
            return
        interval_s = (now_s - self._started_s) / INTERVALS_PER_ELAPSED
        self._next_line_s = now_s + min(max(interval_s, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)
        by_part = ", ".join(f"{name} {part:.4f}" for name, part in parts.items())
        losses = f"loss {loss:.4f} ({by_part})" if parts else f"loss {loss:.4f}"
        line = f"step {step}/{self._num_steps}  {losses}  grad norm {grad_norm:.3g}  {speed}"
        print(line, file=self._stream, flush=True)

    def remaining(self, step: int) -> str:
        """The time left after `step` as `h:mm:ss`, at the mean speed of the last logged steps."""
        mean_s = sum(self._seconds_per_step) / len(self._seconds_per_step)
        return str(datetime.timedelta(seconds=round(mean_s * (self._num_steps - step))))

    def close(self) -> None:
        """Leaves the bar on the screen as it is."""
        if self._bar is not None:
            self._bar.close()


def loss_table(metrics: Sequence[StepMetrics]) -> str:
    """A text-to-image run as a table of about ten rows.

    The first row is the first logged step. The others divide the later steps into ten ranges: losses, gradient norm and
    images/s are means over a range, because single steps scatter with their flow times, and learning rate and images
    are those of its last step. Values that are not finite are left out of the means.

    Args:
        metrics: logged steps, oldest first; at least one.
    """
    rest = metrics[1:]
    num_ranges = min(NUM_TABLE_RANGES, len(rest))
    cuts = [round(index * len(rest) / num_ranges) for index in range(num_ranges + 1)] if rest else [0]
    ranges = [metrics[:1]] + [rest[start:stop] for start, stop in pairwise(cuts)]
    rows = [TABLE_COLUMNS, *(_table_row(part) for part in ranges)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _table_row(part: Sequence[StepMetrics]) -> tuple[str, ...]:
    first, last = part[0], part[-1]
    return (
        str(last.step) if len(part) == 1 else f"{first.step}-{last.step}",
        f"{last.images:,}",
        f"{_mean([point.loss for point in part]):.4f}",
        f"{_mean([point.loss_vision for point in part]):.4f}",
        f"{_mean([point.loss_text for point in part]):.4f}",
        f"{_mean([point.grad_norm for point in part]):.3g}",
        f"{last.lr:.2e}",
        f"{_mean([point.images_per_s for point in part]):.3g}",
    )


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
