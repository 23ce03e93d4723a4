"""Scores as a table of plain text: values with their intervals, figures, notes."""

from __future__ import annotations

from collections.abc import Sequence

from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import Scores

_PERCENT = 100.0


def format_scores(scores: Scores) -> str:
    """The table of a metric, with a line that says what it is of.

    Values that are parts have the number of prompts that have a share in them.
    """
    metric = find_metric(scores.metric)
    prompts = {image.prompt_id for image in scores.images}
    heading = f"{metric.title} of {scores.model}"
    if scores.images:
        heading += f": {len(prompts)} prompts, {len(scores.images)} images"
    rows: list[tuple[str, ...]] = []
    if scores.images:
        counts: dict[str, set[str]] = {OVERALL: prompts}
        for image in scores.images:
            for part in image.parts:
                counts.setdefault(part, set()).add(image.prompt_id)
        rows.append((metric.name, "value", "95 % interval", "prompts"))
        for name, found in estimates(scores.images, metric.combine).items():
            value, low, high = (_number(x * metric.scale, metric.scale) for x in (found.value, found.low, found.high))
            number = str(len(counts[name])) if name in counts else ""
            rows.append((name, value, f"{low} to {high}", number))
    elif scores.figures:
        rows.append((metric.name, "value", "", ""))
    rows += [(name, _number(value * metric.scale, metric.scale), "", "") for name, value in scores.figures.items()]
    notes = [f"note: {note}" for note in scores.notes]
    return "\n".join([heading, "", *_lines(rows), *([""] if notes else []), *notes])


def _number(value: float, scale: float) -> str:
    """Two digits after the point of percent and of large values, four of those up to 1."""
    return f"{value:.2f}" if scale == _PERCENT or abs(value) > 1 else f"{value:.4f}"


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
