"""The metrics of a run, one JSON object per logged step in `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bitdance_scale.atomic_files import write_text
from bitdance_scale.errors import DataError
from bitdance_scale.renames import RENAMED_FIELDS, with_new_names

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

Line = TypeVar("Line")


@dataclass(frozen=True)
class StepMetrics:
    """What is known about one optimiser step, over all ranks.

    JSON has no NaN or infinity: a non-finite number is stored as null and read back as NaN. `mfu` alone is null when
    it is unknown.

    Attributes:
        step: optimiser step, from 1.
        images: images seen since the start of the run, this step included.
        tokens: positions seen since the start of the run, padding left out.
        loss: weighted sum of the two losses, the one that is differentiated.
        loss_vision: flow loss, a mean over the predicted vision tokens of the global batch (Eq. 3 and 7).
        loss_text: cross-entropy in nats, a mean over the text targets of the global batch; 0 without any.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
        step_s: wall-clock seconds per optimiser step since the previous logged one, saving and sampling left out.
        data_wait_s: part of `step_s` spent waiting for the loader, on the slowest rank.
        tokens_per_s: positions per second of all ranks together, padding left out.
        images_per_s: images per second of all ranks together.
        mfu: model FLOPs utilisation in 0..1 (`flops.py`); None where the device's peak is unknown.
        images_by_resolution: resolution (`side_px`) -> images of it seen since the start of the run.
        padding_share: share of the step's positions that are padding, in 0..1.
        memory_bytes: highest memory in use on any rank so far.
        skipped_samples: samples since the start of the run that could not be read and were left out.
        sample_errors: cause (`data_errors.ErrorCause`) -> samples with it since the start of the run: the skipped samples by cause, and samples
            trained without a caption.
        steps_ready: steps that had been read ahead when this one was taken, on the replica with the fewest.
        skipped_steps: steps since the start of the run whose gradients were not finite and changed nothing.
        images_by_source: name of the source -> images of it planned since the start of the run, skipped_samples not left out;
            empty where `data.shards` is the only source.
    """

    step: int
    images: int
    tokens: int
    loss: float
    loss_vision: float
    loss_text: float
    grad_norm: float
    lr: float
    step_s: float
    data_wait_s: float
    tokens_per_s: float
    images_per_s: float
    mfu: float | None
    images_by_resolution: dict[int, int]
    padding_share: float
    memory_bytes: int
    skipped_samples: int = 0
    sample_errors: dict[str, int] = dataclasses.field(default_factory=dict)
    steps_ready: int = 0
    skipped_steps: int = 0
    images_by_source: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """One line of strict JSON, without the line end."""
        values = {name: _finite(value) for name, value in dataclasses.asdict(self).items()}
        return json.dumps(values, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> StepMetrics:
        """Reads a line of `to_json`.

        Raises:
            ValueError: the line is no JSON object, or has other fields than a `StepMetrics`.
        """
        values = _fields(line, StepMetrics)
        for name, value in values.items():
            if value is None and name != "mfu":
                values[name] = math.nan
        values["images_by_resolution"] = {int(side): count for side, count in values["images_by_resolution"].items()}
        return StepMetrics(**values)


@dataclass(frozen=True)
class Evaluation:
    """Losses on held-out images with fixed noise, over all ranks.

    Flow times are spread evenly over 0 .. 1, unlike those of training, so that every part of the flow is seen as well as
    any other; the vision losses are therefore compared with each other and not with `StepMetrics.loss_vision`.

    Attributes:
        step: optimiser steps taken.
        vision: flow loss, a mean over all predicted vision tokens (Eq. 7).
        vision_by_resolution: the same by resolution (`side_px`).
        vision_by_time: the same by flow time, in equal parts of 0 .. 1.
        text: cross-entropy in nats, a mean over the text targets.
    """

    step: int
    vision: float
    vision_by_resolution: dict[int, float]
    vision_by_time: tuple[float, ...]
    text: float

    def to_json(self) -> str:
        """One line of strict JSON, without the line end; numbers that are not finite are null."""
        values = dataclasses.asdict(self)
        values["vision_by_resolution"] = {side: _finite(loss) for side, loss in self.vision_by_resolution.items()}
        values["vision_by_time"] = [_finite(loss) for loss in self.vision_by_time]
        return json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> Evaluation:
        """Reads a line of `to_json`; null is read as NaN.

        Raises:
            ValueError: the line is no JSON object, or has other fields than an `Evaluation`.
        """
        values = _fields(line, Evaluation)
        return Evaluation(
            step=values["step"],
            vision=_number(values["vision"]),
            vision_by_resolution={int(side): _number(loss) for side, loss in values["vision_by_resolution"].items()},
            vision_by_time=tuple(_number(loss) for loss in values["vision_by_time"]),
            text=_number(values["text"]),
        )


def append_evaluation(run_folder: Path, evaluation: Evaluation) -> None:
    """Adds a line to `evaluation.jsonl`; lines of this step or later ones, of work that was lost, are dropped."""
    path = run_folder / EVALUATION_FILE
    lines = read_evaluations(path) if path.exists() else []
    kept = [line for line in lines if line.step < evaluation.step]
    write_text(path, "".join(line.to_json() + "\n" for line in [*kept, evaluation]))


class MetricsWriter:
    """Appends metrics to `metrics.jsonl`, one flushed line per logged step.

    A line is handed to the operating system in one write, so a killed process loses at most the line being written.

    Args:
        run_folder: folder of the run; made if absent.
        resumed_step: step of the checkpoint the run goes on from, 0 for a fresh start. Lines of later steps were
            written by a process whose work was lost; they are dropped, so that every step stands in the file once.

    Raises:
        DataError: the existing file is damaged before its last line.
    """

    def __init__(self, run_folder: Path, resumed_step: int) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        path = run_folder / METRICS_FILE
        if path.exists():
            _keep_steps(path, resumed_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, metrics: StepMetrics) -> None:
        """Appends one line and flushes it."""
        self._file.write(metrics.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; further writes fail."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """Reads a metrics file, oldest step first; a torn last line is left out.

    Raises:
        DataError: a line other than the last cannot be read.
        FileNotFoundError: there is no such file.
    """
    return _read_lines(path, StepMetrics.from_json, "metrics")


def read_evaluations(path: Path) -> list[Evaluation]:
    """Reads an evaluation file, oldest step first; a torn last line is left out.

    Raises:
        DataError: a line other than the last cannot be read.
        FileNotFoundError: there is no such file.
    """
    return _read_lines(path, Evaluation.from_json, "held-out losses")


def _read_lines(path: Path, from_json: Callable[[str], Line], what: str) -> list[Line]:
    # A machine that lost power can leave bytes that are no UTF-8 at the end of the file.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(from_json(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: {error}; every line holds the {what} of one step. "
                f"Delete the line, or move the file away to start a new one"
            ) from error
    return values


def _keep_steps(path: Path, last_step: int) -> None:
    """Rewrites the file with the steps up to `last_step`, whole lines only, by way of a renamed copy."""
    kept = [metrics for metrics in read_metrics(path) if metrics.step <= last_step]
    write_text(path, "".join(metrics.to_json() + "\n" for metrics in kept))


def _fields(line: str, kind: type) -> dict[str, Any]:
    """The JSON object of a line, with the fields of a dataclass and no others; fields with a default may be absent."""
    values = json.loads(line)
    if isinstance(values, dict):
        values = with_new_names(values, RENAMED_FIELDS)
    expected = {field.name for field in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    required = {f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing}
    if not isinstance(values, dict) or not required <= values.keys() <= expected:
        raise ValueError(f"expected a JSON object with the fields {sorted(expected)}")
    return values


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
