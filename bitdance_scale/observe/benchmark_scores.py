"""Scores of benchmarks that a run has drawn, a JSON object per line of `benchmarks.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bitdance_scale.observe.metric_sink import STEP
from bitdance_scale.observe.metrics import StepRecord, read_records

BENCHMARKS_FILE = "benchmarks.jsonl"
OVERALL = "overall"
"""The value that a metric is quoted by, as in `evaluation/metrics/metric.py`."""


@dataclass(frozen=True)
class BenchmarkScores(StepRecord):
    """The values of a metric of the pictures that a run has drawn of a benchmark.

    Attributes:
        step: optimiser steps taken.
        benchmark: its name in `evaluate.benchmarks`.
        metric: name of the metric.
        values: by name, `overall` among them; as the metric counts, such as 0..1.
        low, high: ends of the intervals that hold 95 of 100 values over other prompts of the same kind, likewise.
        num_images: images that were scored.
        drawn_s: seconds that drawing and scoring took, of all metrics of the benchmark together.
    """

    content: ClassVar[str] = "scores of a benchmark"

    benchmark: str
    metric: str
    values: dict[str, float] = field(repr=False)
    low: dict[str, float] = field(repr=False)
    high: dict[str, float] = field(repr=False)
    num_images: int
    drawn_s: float

    @property
    def series(self) -> str:
        """Benchmark and metric."""
        return f"{self.benchmark}/{self.metric}"

    def summary(self) -> str:
        """The values in one line."""
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.values.items() if name != OVERALL)
        interval = f"{self.low[OVERALL]:.3g} to {self.high[OVERALL]:.3g}"
        return (
            f"{self.benchmark} after step {self.step}: {self.metric} {self.values[OVERALL]:.3g} ({interval}; {parts}), "
            f"{self.num_images} images in {self.drawn_s:.1f} s"
        )


def benchmark_panels(scores: BenchmarkScores) -> Mapping[str, str]:
    """Names in W&B of the fields of a line: `benchmark/{name}/{metric}/overall`, with '_' for '-'."""
    section = f"benchmark/{scores.benchmark}".replace("-", "_")
    prefix = f"{section}/{scores.metric}".replace("-", "_")
    return {
        "step": STEP,
        "benchmark": "",
        "metric": "",
        "values": f"{prefix}/{{}}",
        "low": f"{prefix}/{{}}_low",
        "high": f"{prefix}/{{}}_high",
        "num_images": "",
        "drawn_s": f"{section}/seconds",
    }


def read_scores_of_run(run_folder: Path) -> list[BenchmarkScores]:
    """The lines of a run, oldest step first; none where there is no file.

    Raises:
        DataError: a line other than the last cannot be read.
    """
    path = run_folder / BENCHMARKS_FILE
    return read_records(path, BenchmarkScores) if path.exists() else []
