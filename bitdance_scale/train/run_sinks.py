"""Where a run writes what it records: metrics.jsonl, evaluation.jsonl, W&B and the console; the same for every job."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe.console import ConsoleProgress
from bitdance_scale.observe.metrics import MetricsWriter, StepRecord, append_evaluation
from bitdance_scale.observe.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

RUN_ID_FILE = "run_id.txt"


@dataclass(frozen=True)
class RecordKinds:
    """What the records of a job are, and what W&B calls their fields.

    Attributes:
        step: class of a logged step.
        step_panels: its fields -> names in W&B, as `wandb_sink.STEP_PANELS`.
        evaluation_panels: the same of an evaluation.
        summaries: section of panels -> what W&B's table of runs shows of it, as `wandb_sink.SUMMARIES`.
    """

    step: type[StepRecord]
    step_panels: Mapping[str, str]
    evaluation_panels: Mapping[str, str]
    summaries: Mapping[str, str]


class RunSinks:
    """The sinks of a run, on rank 0; on other ranks it does nothing. A context manager.

    Args:
        is_active: whether this is rank 0.
        section: `[observe]`.
        config: the whole configuration, a dataclass.
        run_folder: the run's folder.
        num_steps: steps of the run.
        resumed_step: step the run goes on from; metrics of later steps are dropped, their work was lost.
        kinds: what the job records.
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
        if not is_active:
            return
        self._writer = MetricsWriter(run_folder, resumed_step, kinds.step)
        self._wandb = WandbSink(
            section, run_folder, dataclasses.asdict(config), _run_id(run_folder), summaries=kinds.summaries
        )
        self._console = ConsoleProgress(num_steps, resumed_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_active:
            self._console.close()
            self._writer.close()
            self.close()
            self._wandb.finish()

    def close(self) -> None:
        """What a job still shows at the end, before W&B ends; called on rank 0."""

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
        if self.is_active:
            self._writer.write(record)
            self._wandb.log(record, self._kinds.step_panels)
            self._console.update(
                record.step, loss, parts, grad_norm=grad_norm, images_per_s=images_per_s, step_s=step_s
            )

    def write_evaluation(self, record: StepRecord, images: int) -> None:
        """Records an evaluation everywhere but on the console; `images`: those trained on so far."""
        if self.is_active:
            append_evaluation(self.run_folder, record)
            self._wandb.log(record, self._kinds.evaluation_panels, images)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Hands a picture file to W&B."""
        if self.is_active:
            self._wandb.log_image(step, name, path, f"step {step}")


def _run_id(run_folder: Path) -> str:
    """The id of this run in W&B, the same after every resume."""
    path = run_folder / RUN_ID_FILE
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
