"""Where a run writes what it records, the same for every job.

The places are metrics.jsonl, evaluation.jsonl, benchmarks.jsonl, W&B, TensorBoard and the console.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe.benchmark_scores import BENCHMARKS_FILE, BenchmarkScores, benchmark_panels
from bitdance_scale.observe.console import ConsoleProgress
from bitdance_scale.observe.metric_sink import MetricSink
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, EvaluationWriter, MetricsWriter, StepRecord
from bitdance_scale.observe.tensorboard_sink import TensorboardSink
from bitdance_scale.observe.wandb_sink import WandbSink
from bitdance_scale.observe.write_faults import WriteFaults
from bitdance_scale.parallel.agreement import all_ranks

logger = logging.getLogger(__name__)

RUN_ID_FILE = "run_id.txt"
# What W&B takes as an id.
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class RecordKinds:
    """What the records of a job are, and what W&B calls their fields.

    Attributes:
        step: class of a logged step.
        step_panels: its fields -> names in W&B, as `metric_sink.STEP_PANELS`.
        evaluation_panels: the same of an evaluation.
        summaries: section of panels -> what W&B's table of runs shows of it, as `metric_sink.SUMMARIES`.
        evaluation: class of an evaluation.
    """

    step: type[StepRecord]
    step_panels: Mapping[str, str]
    evaluation_panels: Mapping[str, str]
    summaries: Mapping[str, str]
    evaluation: type[StepRecord]


class RunSinks:
    """The sinks of a run, on rank 0; on other ranks it does nothing. A context manager.

    All ranks make it, and all hear of what rank 0 cannot open. After that a full or failing disk is warned of and does
    not end the run: lines wait in memory until there is room, pictures are left out.

    Args:
        is_active: whether this is rank 0.
        section: `[observe]`.
        config: the whole configuration, a dataclass.
        run_folder: the run's folder.
        num_steps: steps of the run.
        resumed_step: step the run goes on from; metrics of later steps are dropped, their work was lost.
        kinds: what the job records.

    Raises:
        DataError: on all ranks: metrics.jsonl or another file of lines is damaged before its last line.
        ConfigError: on all ranks: a sink is configured that cannot be used.
    """

    def __init__(
        self,
        *,
        is_active: bool,
        section: ObserveSection,
        config: Any,
        run_folder: Path,
        num_steps: int,
        resumed_step: int,
        kinds: RecordKinds,
    ) -> None:
        self.run_folder = run_folder
        self.is_active, self._kinds = is_active, kinds
        self.faults = WriteFaults()
        with all_ranks():
            if is_active:
                self._open(section, config, num_steps, resumed_step)

    def _open(self, section: ObserveSection, config: Any, num_steps: int, resumed_step: int) -> None:
        kinds, folder = self._kinds, self.run_folder
        self._writer = MetricsWriter(folder, resumed_step, kinds.step)
        self._writers = {EVALUATION_FILE: EvaluationWriter(folder, kinds.evaluation)}
        self._writers[BENCHMARKS_FILE] = EvaluationWriter(folder, BenchmarkScores, BENCHMARKS_FILE)
        run_id = _run_id(folder, self.faults)
        self._sinks: dict[str, MetricSink] = {
            "W&B": WandbSink(section, folder, dataclasses.asdict(config), run_id, summaries=kinds.summaries)
        }
        if section.tensorboard:
            self._sinks["TensorBoard"] = TensorboardSink(folder, resumed_step)
        self._console = ConsoleProgress(num_steps, resumed_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_active:
            return
        with self.faults.tolerated("standard output"):
            self._console.close()
        with self.faults.tolerated(METRICS_FILE):
            self._writer.close()
        self._flush()
        waiting = {METRICS_FILE: len(self._writer.waiting)}
        waiting |= {file: len(writer.waiting) for file, writer in self._writers.items()}
        lost = [file for file, num_lines in waiting.items() if num_lines]
        if lost:
            logger.warning("%d lines of %s are lost", sum(waiting.values()), " and ".join(lost))
        self.close()
        for name, sink in self._sinks.items():
            with self.faults.tolerated(name):
                sink.finish()

    def close(self) -> None:
        """What a job still shows at the end, before the sinks end; called on rank 0."""

    def write_step(
        self,
        record: StepRecord,
        loss: float,
        parts: Mapping[str, float],
        *,
        grad_norm: float,
        images_per_s: float,
        step_s: float,
    ) -> None:
        """Records a logged step everywhere; what the console shows of it is `ConsoleProgress.update`'s."""
        if not self.is_active:
            return
        with self.faults.tolerated(METRICS_FILE):
            self._writer.write(record)
        self._flush()
        for name, sink in self._sinks.items():
            with self.faults.tolerated(name):
                sink.log(record, self._kinds.step_panels)
        with self.faults.tolerated("standard output"):
            self._console.update(
                record.step, loss, parts, grad_norm=grad_norm, images_per_s=images_per_s, step_s=step_s
            )

    def write_evaluation(self, record: StepRecord, images: int) -> None:
        """Records an evaluation everywhere but on the console; `images`: those trained on so far."""
        if not self.is_active:
            return
        self._write(EVALUATION_FILE, record, self._kinds.evaluation_panels, images)

    def write_scores(self, scores: BenchmarkScores, images: int) -> None:
        """Records the scores of a benchmark everywhere but on the console; `images`: those trained on so far."""
        if self.is_active:
            self._write(BENCHMARKS_FILE, scores, benchmark_panels(scores), images)

    def _write(self, file: str, record: StepRecord, panels: Mapping[str, str], images: int) -> None:
        with self.faults.tolerated(file):
            self._writers[file].write(record)
        for name, sink in self._sinks.items():
            with self.faults.tolerated(name):
                sink.log(record, panels, images)

    def _flush(self) -> None:
        for file, writer in self._writers.items():
            with self.faults.tolerated(file):
                writer.flush()

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Hands a picture file to the sinks."""
        if not self.is_active:
            return
        for title, sink in self._sinks.items():
            with self.faults.tolerated(title):
                sink.log_image(step, name, path, f"step {step}")


def _run_id(run_folder: Path, faults: WriteFaults) -> str:
    """The id of this run in W&B, the same after every resume; a new one where the file holds none."""
    path = run_folder / RUN_ID_FILE
    try:
        found = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        found = None
    if found is not None and _RUN_ID.fullmatch(found):
        return found
    made = uuid.uuid4().hex[:12]
    if found is not None:
        logger.warning("%s: holds no id of a W&B run (%r); the run goes on there as a new one, %s", path, found, made)
    with faults.tolerated(RUN_ID_FILE):
        write_text(path, made + "\n")
    return made
