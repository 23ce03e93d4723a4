"""What the files of a run folder say of a text-to-image run, for the pages that show it."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bitdance_scale.observe.benchmark_scores import BenchmarkScores, read_scores_of_run
from bitdance_scale.observe.metrics import (
    EVALUATION_FILE,
    METRICS_FILE,
    Evaluation,
    Record,
    StepMetrics,
    read_evaluations,
    read_metrics,
)
from bitdance_scale.observe.panel import short
from bitdance_scale.observe.sample_grids import has_start, newest_samples

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class RunRecord:
    """A text-to-image run, read from the files of its folder.

    Attributes:
        name: name of the run.
        metrics: logged steps, oldest first, each step once.
        evaluations: losses on held-out images, likewise.
        clip_norm: gradient norm above which steps are clipped; None if it is unknown or steps are not clipped.
        scores: of benchmarks, each series oldest first.
        pictures: the newest grid of samples, of a run that shows them beside those of its start.
    """

    name: str
    metrics: Sequence[StepMetrics]
    evaluations: Sequence[Evaluation]
    clip_norm: float | None = None
    scores: Sequence[BenchmarkScores] = ()
    pictures: Path | None = None

    @property
    def num_steps(self) -> int:
        """The last step in the files."""
        return max((record.step for records in (self.metrics, self.evaluations) for record in records[-1:]), default=0)

    @property
    def trained_s(self) -> float:
        """Seconds spent in steps; saving, sampling and evaluating are left out."""
        steps = [0, *(point.step for point in self.metrics)]
        return sum(
            (step - before) * point.step_s for (before, step), point in zip(pairwise(steps), self.metrics, strict=True)
        )

    def summary(self) -> str:
        """The length of the run in steps, images, tokens and time."""
        if not self.metrics:
            return "no step logged yet"
        last = self.metrics[-1]
        time = datetime.timedelta(seconds=round(self.trained_s))
        return f"{last.step:,} steps, {last.images:,} images, {short(last.tokens)} tokens, {time} of training"


def read_run(run_folder: Path) -> RunRecord:
    """Reads a run folder, even while the run writes to it or after it was killed.

    Raises:
        DataError: a line of a file other than its last cannot be read.
        FileNotFoundError: there is no metrics file.
    """
    evaluations, config = run_folder / EVALUATION_FILE, run_folder / CONFIG_FILE
    clip_norm = None
    if config.exists():
        clip_norm = tomllib.loads(config.read_text(encoding="utf-8")).get("optim", {}).get("clip_norm") or None
    return RunRecord(
        name=run_folder.resolve().name,
        metrics=each_once(read_metrics(run_folder / METRICS_FILE)),
        evaluations=each_once(read_evaluations(evaluations)) if evaluations.exists() else [],
        clip_norm=clip_norm,
        scores=read_scores_of_run(run_folder),
        pictures=newest_samples(run_folder) if has_start(run_folder) else None,
    )


def each_once(records: Sequence[Record]) -> list[Record]:
    """Keeps each step once: what came before a repeated step, from that step on, was work that was lost."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept
