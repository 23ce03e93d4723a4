"""Drawings of one model that differ in one number, such as the steps or the guidance (arXiv 2602.14041 Fig. 8)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.report.comparison import Section
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder
from bitdance_scale.evaluation.report.settings import setting_text, setting_title, split_settings

_PREFIX = "settings."
_NO_AXES = frozenset({"settings.batch_size"})
"""It changes the last bits of an image, and no quality."""
_NO_IDENTITY = frozenset({"model.name", "model.block_tokens"})
"""What the digest of the weights says already."""


@dataclass(frozen=True)
class Curve:
    """Values of a line of a sweep.

    Attributes:
        label: of the line; the same in all panels.
        positions: of the setting, rising.
        values: at each position; those without an interval are numbers alone.
    """

    label: str
    positions: Sequence[float]
    values: Sequence[Estimate | float]


@dataclass(frozen=True)
class Line:
    """Drawings that share all but one setting.

    Attributes:
        label: what tells them from those of other lines.
        shared: the settings that they share.
        points: (value of the setting, drawing), lowest first.
    """

    label: str
    shared: Mapping[str, Any]
    points: tuple[tuple[float, ScoredFolder], ...]


@dataclass(frozen=True)
class Sweep:
    """Lines over the same setting in the same benchmark.

    Attributes:
        benchmark: its name.
        setting: dotted name in `drawing.json`.
        lines: each of at least two values of the setting.
    """

    benchmark: str
    setting: str
    lines: tuple[Line, ...]


def find_sweeps(folders: Sequence[ScoredFolder]) -> list[Sweep]:
    """All sweeps: same weights, prompts, seed and settings but for one number of `settings`.

    Drawings with other seeds are no sweep.
    """
    known = [folder for folder in folders if folder.drawing.get("model.sha256")]
    axes = dict.fromkeys(key for folder in known for key, value in folder.drawing.items() if _is_axis(key, value))
    sweeps = []
    for axis in axes:
        groups: dict[str, list[ScoredFolder]] = {}
        for folder in known:
            if _is_axis(axis, folder.drawing.get(axis)):
                groups.setdefault(json.dumps(_rest(folder, axis), sort_keys=True), []).append(folder)
        found = [group for group in groups.values() if len({folder.drawing[axis] for folder in group}) > 1]
        for benchmark in dict.fromkeys(group[0].benchmark for group in found):
            of_it = [group for group in found if group[0].benchmark == benchmark]
            labels = _labels([group[0] for group in of_it], axis)
            lines = (
                Line(
                    label,
                    _rest(group[0], axis),
                    tuple(sorted(((folder.drawing[axis], folder) for folder in group), key=lambda point: point[0])),
                )
                for label, group in zip(labels, of_it, strict=True)
            )
            sweeps.append(Sweep(benchmark, axis, tuple(lines)))
    return sweeps


def panels_of(sweep: Sweep, sections: Sequence[Section]) -> dict[str, list[Curve]]:
    """The values to draw of a sweep: the overall value of a metric, or those of whole sets where it has none."""
    panels: dict[str, list[Curve]] = {}
    for section in sections:
        for line in sweep.lines:
            found: dict[str, list[tuple[float, Estimate | float]]] = {}
            for position, folder in line.points:
                for title, value in _quoted(section, folder.name).items():
                    found.setdefault(title, []).append((position, value))
            for title, points in found.items():
                if len({position for position, _ in points}) > 1:
                    curve = Curve(line.label, *zip(*points, strict=True))
                    panels.setdefault(title, []).append(curve)
    return panels


def _quoted(section: Section, name: str) -> Mapping[str, Estimate | float]:
    """The values of a drawing that are quoted, by what they are called."""
    result = section.results.get(name)
    if result is None:
        return {}
    if result.values:
        return {section.metric.title: result.values[OVERALL].estimate}
    return result.figures


def _is_axis(key: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return key.startswith(_PREFIX) and key not in _NO_AXES and is_number


def _rest(folder: ScoredFolder, axis: str) -> dict[str, Any]:
    return {key: value for key, value in folder.drawing.items() if key != axis and key not in _NO_IDENTITY}


def _labels(folders: Sequence[ScoredFolder], axis: str) -> list[str]:
    """The model of each line, with the settings that tell it from others of this name."""
    names = [str(folder.drawing.get("model.name")) for folder in folders]
    labels = []
    for name, folder in zip(names, folders, strict=True):
        same = [other for other_name, other in zip(names, folders, strict=True) if other_name == name]
        differing = split_settings([_rest(other, axis) for other in same]).differing
        told = [f"{setting_title(key)} {setting_text(key, folder.drawing.get(key))}" for key in differing]
        labels.append(", ".join([name, *told]))
    return labels
