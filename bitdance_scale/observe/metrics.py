"""The metrics of a run, a JSON object per line: logged steps in `metrics.jsonl`, evaluations in `evaluation.jsonl`.

Every job has its own dataclasses of lines, subclasses of `StepRecord`; those here are of text-to-image training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin, get_type_hints

from bitdance_scale.atomic_files import write_text
from bitdance_scale.errors import DataError
from bitdance_scale.renames import RENAMED_FIELDS, with_new_names

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
MAX_WAITING_LINES = 100_000
"""Lines that wait in memory for room on the disk, about 60 MB; the oldest are lost first."""


@dataclass(frozen=True)
class StepRecord:
    """What is known about a run after one optimiser step: a line of a file.

    A subclass is a frozen dataclass that adds fields. They may be `int`, `float`, `float | None`, `str`,
    `dict[str | int, ...]` and `tuple[..., ...]` of these. JSON has no NaN or infinity: a `float` that is not finite is
    stored as null and read back as NaN. A field with a default may be absent from a line.

    Attributes:
        content: what a line holds, for messages.
        step: optimiser steps taken.
    """

    content: ClassVar[str] = "metrics"

    step: int

    @property
    def series(self) -> str:
        """What tells records of one step in one file apart; empty where there is one of a step."""
        return ""

    def to_json(self) -> str:
        """One line of strict JSON, without the line end."""
        return json.dumps(_encoded(dataclasses.asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads a line of `to_json`, also one of version 0.1.

        Raises:
            ValueError: the line is no JSON object, or has other fields than this class.
        """
        values = json.loads(line)
        hints, required = _fields(cls)  # type: ignore[arg-type]  # mypy takes a dataclass itself for unhashable
        if isinstance(values, dict):
            values = with_new_names(values, RENAMED_FIELDS)
        if not isinstance(values, dict) or not required <= values.keys() <= hints.keys():
            raise ValueError(f"expected a JSON object with the fields {sorted(hints)}")
        return cls(**{name: _decoded(value, hints[name]) for name, value in values.items()})


Record = TypeVar("Record", bound=StepRecord)


@dataclass(frozen=True)
class StepMetrics(StepRecord):
    """A logged step of text-to-image training, over all ranks.

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
        mfu: model FLOPs utilisation in 0..1 (`cost.py`); None where the device's peak is unknown.
        images_by_resolution: resolution (`side_px`) -> images of it seen since the start of the run.
        padding_share: share of the step's positions that are padding, in 0..1.
        memory_bytes: highest memory in use on any rank so far.
        skipped_samples: samples since the start of the run that could not be read and were left out.
        sample_errors: cause (`data_errors.ErrorCause`) -> samples with it since the start of the run: the
            skipped samples by cause, and samples trained without a caption.
        steps_ready: steps that had been read ahead when this one was taken, on the replica with the fewest.
        skipped_steps: steps since the start of the run whose gradients were not finite and changed nothing.
        images_by_source: name of the source -> images of it planned since the start of the run, skipped samples
            included; empty where `data.shards` is the only source.
        spikes: steps since the start of the run with a loss or gradient norm far above its course
            (`train/step_guards.py`), taken or not.
        slowest_rank: the rank whose forward passes are 10 % or more behind (`train/straggler.py`); -1: none is.
        slowest_excess: share by which the slowest rank is above the median of the other replicas.
    """

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
    spikes: int = 0
    slowest_rank: int = -1
    slowest_excess: float = 0.0

    @property
    def wait_share(self) -> float:
        """Part of a step's time spent waiting for the loader, in 0..1."""
        return self.data_wait_s / self.step_s


@dataclass(frozen=True)
class Evaluation(StepRecord):
    """Losses of text-to-image training on held-out images with fixed noise, over all ranks.

    Flow times are spread evenly over 0..1, unlike those of training, so that every part of the flow counts alike.
    Compare the vision losses with each other, not with `StepMetrics.loss_vision`.

    Attributes:
        step: optimiser steps taken.
        vision: flow loss, a mean over all predicted vision tokens (Eq. 7).
        vision_by_resolution: the same by resolution (`side_px`).
        vision_by_time: the same by flow time, in equal parts of 0..1.
        text: cross-entropy in nats, a mean over the text targets.
    """

    content: ClassVar[str] = "held-out losses"

    vision: float
    vision_by_resolution: dict[int, float]
    vision_by_time: tuple[float, ...]
    text: float


class MetricsWriter(Generic[Record]):
    """Appends metrics to `metrics.jsonl`, one line per logged step.

    A line is handed to the operating system in one write, so a killed process loses at most the line being written.
    Lines that could not be written wait and are written before the next one.

    Args:
        run_folder: folder of the run; made if absent.
        resumed_step: step of the checkpoint the run goes on from, 0 for a fresh start. Lines of later steps were
            written by a process whose work was lost; they are dropped, so that every step is in the file once.
        kind: class of the lines, those that the file holds already included.

    Attributes:
        waiting: lines that could not be written yet, oldest first; at most `MAX_WAITING_LINES`.

    Raises:
        DataError: the existing file is damaged before its last line.
    """

    def __init__(self, run_folder: Path, resumed_step: int, kind: type[Record]) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self._path = run_folder / METRICS_FILE
        if self._path.exists():
            kept = [metrics for metrics in read_records(self._path, kind) if metrics.step <= resumed_step]
            _rewrite(self._path, kept)
        self.waiting: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._descriptor: int | None = self._open()
        # Up to here the file consists of whole lines.
        self._num_bytes = os.fstat(self._descriptor).st_size

    def write(self, metrics: Record) -> None:
        """Appends one line, after those that wait.

        Raises:
            OSError: of the file system; the line waits.
        """
        self.waiting.append(metrics.to_json() + "\n")
        self.flush()

    def flush(self) -> None:
        """Writes the lines that wait; the errors of `write`."""
        if not self.waiting:
            return
        content = "".join(self.waiting).encode("utf-8")
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            # A full disk may have taken a part of a line.
            if os.fstat(self._descriptor).st_size > self._num_bytes:
                os.ftruncate(self._descriptor, self._num_bytes)
            left = memoryview(content)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            # A file server that was away may want the file opened again.
            self._close()
            raise
        self._num_bytes += len(content)
        self.waiting.clear()

    def close(self) -> None:
        """Writes the lines that wait and closes the file.

        Raises:
            OSError: as `write`; the lines that wait are lost.
        """
        try:
            self.flush()
        finally:
            self._close()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class EvaluationWriter:
    """Writes evaluations to `evaluation.jsonl`, or scores to a file like it; one that could not be written waits.

    Args:
        run_folder: folder of the run.
        kind: class of the lines.
        file: name of the file.

    Attributes:
        waiting: evaluations that could not be written yet, oldest first.

    Raises:
        DataError: the existing file is damaged before its last line.
    """

    def __init__(self, run_folder: Path, kind: type[StepRecord], file: str = EVALUATION_FILE) -> None:
        self._path = run_folder / file
        self.waiting: list[StepRecord] = []
        if self._path.exists():
            read_records(self._path, kind)

    def write(self, evaluation: StepRecord) -> None:
        """Adds an evaluation, after those that wait.

        Raises:
            OSError: of the file system; the evaluation waits.
        """
        self.waiting.append(evaluation)
        self.flush()

    def flush(self) -> None:
        """Writes the evaluations that wait; the errors of `write`."""
        while self.waiting:
            append_record(self._path, self.waiting[0])
            self.waiting.pop(0)


def append_evaluation(run_folder: Path, evaluation: StepRecord) -> None:
    """`append_record` to `evaluation.jsonl`."""
    append_record(run_folder / EVALUATION_FILE, evaluation)


def append_record(path: Path, record: StepRecord) -> None:
    """Adds a line to a file; lines of later steps, and of the same series and step, were of work that was lost.

    These are dropped.
    """
    lines = read_records(path, type(record)) if path.exists() else []
    kept = [
        line for line in lines if line.step < record.step or (line.step == record.step and line.series != record.series)
    ]
    _rewrite(path, [*kept, record])


def read_metrics(path: Path) -> list[StepMetrics]:
    """`read_records` of a metrics file of text-to-image training."""
    return read_records(path, StepMetrics)


def read_evaluations(path: Path) -> list[Evaluation]:
    """`read_records` of an evaluation file of text-to-image training."""
    return read_records(path, Evaluation)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Reads a file of records, oldest step first; a torn last line is left out.

    Raises:
        DataError: a line other than the last cannot be read.
        FileNotFoundError: there is no such file.
    """
    # A machine that lost power can leave bytes that are no UTF-8 at the end of the file.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(kind.from_json(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: {error}; every line holds the {kind.content} of one step. "
                f"Delete the line, or move the file away to start a new one"
            ) from error
    return records


def _rewrite(path: Path, records: Sequence[StepRecord]) -> None:
    write_text(path, "".join(record.to_json() + "\n" for record in records))


@functools.cache
def _fields(kind: type[StepRecord]) -> tuple[dict[str, Any], set[str]]:
    """Types of the fields of a class by name, and the names of the fields without a default."""
    fields, hints, missing = dataclasses.fields(kind), get_type_hints(kind), dataclasses.MISSING
    required = {field.name for field in fields if field.default is missing and field.default_factory is missing}
    return {field.name: hints[field.name] for field in fields}, required


def _encoded(value: Any) -> Any:
    """The value with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encoded(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any, hint: Any) -> Any:
    """The value of a field of type `hint`: NaN for null, keys and tuples in their own types."""
    kind = get_origin(hint) or hint
    if kind is float and value is None:
        return math.nan
    if kind in (dict, tuple) and not isinstance(value, dict if kind is dict else list):
        raise ValueError(f"expected {hint}, got {value!r}")
    if kind is dict:
        key_type, item_hint = get_args(hint)
        return {key_type(key): _decoded(item, item_hint) for key, item in value.items()}
    if kind is tuple:
        return tuple(_decoded(item, get_args(hint)[0]) for item in value)
    return value
