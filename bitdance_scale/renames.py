"""What earlier versions had otherwise. Old settings and commands are refused with the new name; old runs are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_SETTINGS = {
    "data.classes": "data.resolutions",
    "data.max_hole_share": "data.max_skipped_share",
    "eval": "evaluate",
    "run.log_every_steps": "observe.log_every_steps",
}
"""Setting of version 0.1 -> its name today."""

EARLIER_VALUES: Mapping[str, Any] = {"vision.context": "queries"}
"""Setting that earlier versions did not have -> what they did, where today's default is another."""

RENAMED_FIELDS = {
    "images_by_class": "images_by_resolution",
    "vision_by_class": "vision_by_resolution",
    "holes": "skipped_samples",
    "faults": "sample_errors",
}
"""Field of `metrics.jsonl`, `evaluation.jsonl` and `train_state.json` of version 0.1 -> its name today."""

RENAMED_COMMANDS = {"draw": "evaluate draw imagenet RUN --out DIR"}
"""Command that is no longer there -> the one in its place."""


def with_new_names(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The values under the names of today; names that did not change stay."""
    return {renamed.get(name, name): value for name, value in values.items()}
