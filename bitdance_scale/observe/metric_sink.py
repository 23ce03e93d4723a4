"""Where metrics and pictures of a run are shown besides its own files, and what they are called there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bitdance_scale.observe.metrics import StepRecord

GIB = 2**30

STEP = "progress/step"
IMAGES = "progress/images"
# Field or property of a record -> name in W&B, which shows the part before the slash as one section of panels. `{}` is
# the key of a field with several values: the resolution, source, cause or part of the flow time.
STEP_PANELS = {
    "step": STEP,
    "images": IMAGES,
    "tokens": "progress/tokens",
    "loss": "loss/total",
    "loss_vision": "loss/flow",
    "loss_text": "loss/text",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "skipped_steps": "optim/skipped_steps",
    "spikes": "optim/spikes",
    "step_s": "speed/step_s",
    "tokens_per_s": "speed/tokens_per_s",
    "images_per_s": "speed/images_per_s",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_gib",
    "slowest_rank": "speed/slowest_rank",
    "slowest_excess": "speed/slowest_excess",
    "data_wait_s": "data/wait_s",
    "wait_share": "data/wait_share",
    "padding_share": "data/padding_share",
    "images_by_resolution": "data/images_{}_px",
    "images_by_source": "data/images_of_{}",
    "skipped_samples": "data/skipped_samples",
    "sample_errors": "data/sample_errors_{}",
    "steps_ready": "data/steps_ready",
}
EVALUATION_PANELS = {
    "step": STEP,
    "vision": "evaluate/flow",
    "vision_by_resolution": "evaluate/flow_{}_px",
    "vision_by_time": "evaluate/flow_time_{}",
    "text": "evaluate/text",
}
# Section of panels -> what W&B's table of runs shows of its metrics.
SUMMARIES = {
    "progress": "last",
    "loss": "last",
    "evaluate": "min",
    "benchmark": "max",
    "optim": "last",
    "speed": "last",
    "data": "last",
}


class MetricSink(Protocol):
    """A place that shows metrics, on the one rank that logs: W&B or TensorBoard."""

    def log(self, record: StepRecord, panels: Mapping[str, str], images: int | None = None) -> None:
        """Adds a record at its step.

        Args:
            record: what is known of the step.
            panels: field or property of the record -> name of the metric, as in `STEP_PANELS`; what has an empty
                name is not shown.
            images: images seen so far, where the record has no such field.
        """

    def log_image(self, step: int, name: str, path: Path, caption: str) -> None:
        """Adds a picture file under `name`."""

    def finish(self) -> None:
        """Waits until everything is written, and closes."""


def panel_values(record: StepRecord, panels: Mapping[str, str]) -> dict[str, float]:
    """The values of a record by their names in W&B; None, an unknown value, is left out, and so is an empty name.

    Raises:
        ValueError: `panels` lacks a field of the record, which would be dropped silently.
    """
    lacking = vars(record).keys() - panels.keys()
    if lacking:
        raise ValueError(f"no name in W&B for {sorted(lacking)} of {type(record).__name__}; add it to the panels")
    values: dict[str, float] = {}
    for key, name in panels.items():
        value = getattr(record, key)
        if isinstance(value, Mapping):
            values |= {name.format(part): number for part, number in value.items()}
        elif isinstance(value, tuple):
            # Parts have numbers: W&B reads the dot of a flow time as a path and then ignores the metric's definition.
            values |= {name.format(f"{part}_of_{len(value)}"): number for part, number in enumerate(value, start=1)}
        elif name and value is not None:
            values[name] = value / GIB if key == "memory_bytes" else value
    return values
