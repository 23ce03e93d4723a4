"""`scores/{metric}.json` in the folder of a drawing: what a scorer found, image by image."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.text_files import read_utf8

SCORES_DIR = "scores"
VERSION = 1
"""Of the file's form."""


@dataclass(frozen=True)
class Scores:
    """What a scorer found in a drawing; all of it JSON values.

    Attributes:
        metric: name of the metric.
        benchmark: name of the benchmark whose layout the folder has; empty for a folder of images of no benchmark.
        model: name of the model in the folder's paths.
        drawing: content of the folder's `drawing.json` at the time; empty for pictures of another program.
        scorer: what was used, and whatever else changes the values: names of networks, digests, settings.
        prompts: texts of all prompts by id, in the benchmark's order.
        images: of every image; empty for metrics of whole sets, such as FID.
        figures: further values that are no sums over images, by name, in the metric's unit, so that its `scale` is of
            them too; a set's own values are here.
        notes: what is to be known when the values are compared with others.
    """

    metric: str
    benchmark: str
    model: str
    drawing: Mapping[str, Any]
    scorer: Mapping[str, Any]
    prompts: Mapping[str, str] = field(repr=False)
    images: tuple[ImageScore, ...] = field(repr=False)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def scores_path(root: Path, metric: str) -> Path:
    """Where the scores of a drawing are."""
    return root / SCORES_DIR / f"{metric}.json"


def write_scores(root: Path, scores: Scores) -> Path:
    """Writes the scores of the drawing in a folder; returns the file."""
    path = scores_path(root, scores.metric)
    write_text(path, json.dumps({"version": VERSION, **dataclasses.asdict(scores)}, indent=1) + "\n")
    return path


def find_scores(root: Path) -> list[Path]:
    """The files of scores of a drawing, in the order of their names."""
    return sorted((root / SCORES_DIR).glob("*.json"))


def read_scores(path: Path) -> Scores:
    """The scores in a file.

    Raises:
        DataError: it cannot be read, is no such file or of another version.
    """
    try:
        content = json.loads(read_utf8(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); score the drawing again") from error
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != VERSION:
        raise DataError(f"{path}: is no file of scores of version {VERSION}; score the drawing again")
    try:
        images = tuple(
            ImageScore(**{**image, "parts": {name: (pair[0], pair[1]) for name, pair in image["parts"].items()}})
            for image in content.pop("images")
        )
        return Scores(**{**content, "images": images, "notes": tuple(content["notes"])})
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is no file of scores ({error!r}); score the drawing again") from error
