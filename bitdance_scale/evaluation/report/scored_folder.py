"""A drawing with its scores, as a folder has them, and what of it is refused before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.benchmarks.manifest import DRAWING_NAME, flat_values, read_drawing
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.score_file import SCORES_DIR, Scores, find_scores, read_scores
from bitdance_scale.wording import first_few

_SCORE = "bitdance evaluate score"


@dataclass(frozen=True)
class ScoredFolder:
    """A drawing that has been scored.

    Attributes:
        name: what it is called in the report; several benchmarks of one model may share it.
        root: the folder.
        benchmark: its name; empty for a folder of images of no benchmark.
        drawing: content of `drawing.json` when it was scored, nested values by dotted names; empty for pictures of
            another program.
        has_manifest: whether `drawing.json` is still there, if it was.
        scores: by metric.
    """

    name: str
    root: Path
    benchmark: str
    drawing: Mapping[str, Any] = field(repr=False)
    has_manifest: bool
    scores: Mapping[str, Scores] = field(repr=False)


def parse_folder(text: str) -> tuple[str, Path]:
    """The name and the folder of `[NAME=]FOLDER`; the name is the folder's own by default.

    Raises:
        ConfigError: there is no such folder, or the name is empty.
    """
    name, has_name, path = text.partition("=")
    if not has_name or Path(text).is_dir():
        name, path = Path(text).resolve().name, text
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; name the folder of a drawing that was scored")
    if not name:
        raise ConfigError(f"{text}: has no name before '='; write NAME=FOLDER, or the folder alone")
    return name, root


def read_folders(folders: Sequence[tuple[str, Path]], metrics: Sequence[str] = ()) -> list[ScoredFolder]:
    """The drawings of a report.

    Args:
        folders: (name, folder) of each.
        metrics: names of those that are read; none: all that are there.

    Raises:
        ConfigError: a folder has no scores or none of these metrics, its drawing is another one than that which was
            scored, or two of one benchmark have the same name.
        DataError: a file of scores is damaged.
    """
    for metric in metrics:
        find_metric(metric)
    found: list[ScoredFolder] = []
    for name, root in folders:
        folder = _read_folder(name, root, metrics)
        for other in found:
            if (other.name, other.benchmark) == (name, folder.benchmark):
                raise ConfigError(
                    f"{other.root} and {root}: are both called {name!r} and of the same benchmark; name them apart, as "
                    f"in first={other.root} second={root}"
                )
        found.append(folder)
    return found


def _read_folder(name: str, root: Path, metrics: Sequence[str]) -> ScoredFolder:
    paths = find_scores(root)
    if not paths:
        raise ConfigError(
            f"{root}: holds no scores ({SCORES_DIR}/*.json); `{_SCORE} {root}` makes them, with the options that "
            f"`{_SCORE} --help` shows"
        )
    scores = {path.stem: _checked(path) for path in paths if not metrics or path.stem in metrics}
    if not scores:
        there = ", ".join(path.stem for path in paths)
        raise ConfigError(
            f"{root}: has scores of {there}, and none of {', '.join(metrics)}; make them with "
            f"`{_SCORE} {root}`, or name others with --metric"
        )
    benchmarks = sorted({one.benchmark for one in scores.values()})
    if len(benchmarks) > 1:
        raise DataError(
            f"{root / SCORES_DIR}: files are of different benchmarks, {' and '.join(map(repr, benchmarks))}; remove "
            "those that are not of this drawing"
        )
    has_manifest = (root / DRAWING_NAME).is_file()
    _refuse_stale(root, scores, has_manifest)
    drawing = flat_values(next(iter(scores.values())).drawing)
    return ScoredFolder(name, root, benchmarks[0], drawing, has_manifest, scores)


def _refuse_stale(root: Path, scores: Mapping[str, Scores], has_manifest: bool) -> None:
    """Scores are of the drawing that is there; where its `drawing.json` is gone, of one and the same."""
    first = next(iter(scores.values()))
    wanted = flat_values(read_drawing(root) if has_manifest else first.drawing)
    for metric, one in scores.items():
        scored = flat_values(one.drawing)
        differing = [key for key in {**wanted, **scored} if wanted.get(key) != scored.get(key)]
        if differing:
            listed = [f"{key} was {scored.get(key)!r} and is {wanted.get(key)!r}" for key in differing]
            raise ConfigError(
                f"{root}: the scores of {metric} are of another drawing than the one there: {first_few(listed)}; score "
                f"it again with `{_SCORE} {root}`, or leave the metric out with --metric"
            )


def _checked(path: Path) -> Scores:
    """The scores in a file, in which every image has a prompt and a number."""
    scores = read_scores(path)
    again = f"score the drawing again with `{_SCORE}`"
    if scores.metric != path.stem:
        raise DataError(f"{path}: holds scores of {scores.metric!r}; name the file after them, or {again}")
    try:
        find_metric(scores.metric)
        if scores.benchmark:
            find_benchmark(scores.benchmark)
    except ConfigError as error:
        raise DataError(f"{path}: {error}; it was written by another version of this program: {again}") from error
    for field_name in ("drawing", "scorer", "prompts", "figures"):
        if not isinstance(getattr(scores, field_name), dict):
            raise DataError(f"{path}: {field_name} is no object; {again}")
    for image in scores.images:
        numbers = [image.value, *(number for pair in image.parts.values() for number in pair)]
        if image.prompt_id not in scores.prompts:
            raise DataError(
                f"{path}: scores an image of prompt {image.prompt_id!r}, which is not among its prompts; {again}"
            )
        if not all(_is_number(number) for number in [image.k, *numbers]):
            raise DataError(
                f"{path}: image {image.k} of prompt {image.prompt_id} has a value that is no number; {again}"
            )
    for name, value in scores.figures.items():
        if not _is_number(value):
            raise DataError(f"{path}: {name} = {value!r} is no number; {again}")
    if not scores.images and not scores.figures:
        raise DataError(f"{path}: holds no value; {again}")
    return scores


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
