"""A report as JSON values, and as rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.report.comparison import Pair, PromptScore, Result, Section
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder
from bitdance_scale.evaluation.report.sweep import Sweep, panels_of

VERSION = 1
"""Of the form of `report.json`, which docs/benchmarks_of_quality.md describes."""
VALUE_COLUMNS = ("benchmark", "metric", "category", "model", "value", "low", "high", "num_prompts")
DIFFERENCE_COLUMNS = (
    "benchmark", "metric", "category", "model", "baseline", "difference", "low", "high", "is_clear",
    "num_better", "num_worse", "num_prompts",
)  # fmt: skip
WORST_COLUMNS = ("benchmark", "metric", "model", "prompt_id", "text", "category", "value", "reasons")


def report_record(
    folders: Sequence[ScoredFolder], sections: Sequence[Section], sweeps: Sequence[Sweep]
) -> dict[str, Any]:
    """All that the page shows, unrounded; values and differences in the metric's scale, those of images as scored."""
    return {
        "version": VERSION,
        "drawings": [
            {
                "name": folder.name,
                "folder": str(folder.root),
                "benchmark": folder.benchmark,
                "settings": dict(folder.drawing),
                "has_manifest": folder.has_manifest,
            }
            for folder in folders
        ],
        "sections": [_section(section) for section in sections],
        "sweeps": [
            _sweep(sweep, [section for section in sections if section.benchmark == sweep.benchmark]) for sweep in sweeps
        ],
    }


def value_rows(sections: Sequence[Section]) -> list[list[Any]]:
    """Rows of `VALUE_COLUMNS`; values without intervals have None for low, high and prompts."""
    rows: list[list[Any]] = []
    for section in sections:
        where = [section.benchmark, section.metric.name]
        for model, result in section.results.items():
            for category, value in result.values.items():
                estimate = value.estimate
                numbers = [estimate.value, estimate.low, estimate.high, value.num_prompts]
                rows.append([*where, category, model, *numbers])
            rows += [[*where, name, model, value, None, None, None] for name, value in result.figures.items()]
    return rows


def difference_rows(sections: Sequence[Section]) -> list[list[Any]]:
    """Rows of `DIFFERENCE_COLUMNS`, of the drawings that are paired."""
    return [
        [
            section.benchmark, section.metric.name, category, pair.model, pair.baseline,
            found.estimate.value, found.estimate.low, found.estimate.high, found.is_clear,
            found.num_better, found.num_worse, found.num_prompts,
        ]
        for section in sections
        for pair in section.pairs
        for category, found in pair.differences.items()
    ]  # fmt: skip


def worst_rows(sections: Sequence[Section]) -> list[tuple[Result, PromptScore, list[Any]]]:
    """Rows of `WORST_COLUMNS`, each with its drawing and its prompt, so that pictures can be added."""
    return [
        (
            result,
            prompt,
            [
                section.benchmark, section.metric.name, model, prompt.prompt_id, prompt.text, prompt.category,
                prompt.value, "; ".join(image.reason for image in prompt.images if image.reason),
            ],
        )
        for section in sections
        for model, result in section.results.items()
        for prompt in result.worst
    ]  # fmt: skip


def _section(section: Section) -> dict[str, Any]:
    metric = section.metric
    return {
        "benchmark": section.benchmark,
        "metric": metric.name,
        "title": metric.title,
        "scale": metric.scale,
        "is_lower_better": metric.is_lower_better,
        "results": {model: _result(result) for model, result in section.results.items()},
        "pairs": [_pair(pair) for pair in section.pairs],
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "values": {
            name: _estimate(value.estimate) | {"num_prompts": value.num_prompts}
            for name, value in result.values.items()
        },
        "figures": dict(result.figures),
        "num_images": len(result.scores.images),
        "scorer": dict(result.scores.scorer),
        "notes": list(result.scores.notes),
        "worst": [_prompt(prompt) for prompt in result.worst],
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "baseline": pair.baseline,
        "model": pair.model,
        "is_paired": not pair.reasons,
        "reasons": list(pair.reasons),
        "differences": {
            name: _estimate(found.estimate)
            | {
                "is_clear": found.is_clear,
                "num_better": found.num_better,
                "num_worse": found.num_worse,
                "num_prompts": found.num_prompts,
            }
            for name, found in pair.differences.items()
        },
        "contrasts": [
            {
                "difference": contrast.difference,
                "baseline": _prompt(contrast.baseline),
                "model": _prompt(contrast.model),
            }
            for contrast in pair.contrasts
        ],
    }


def _prompt(prompt: PromptScore) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "text": prompt.text,
        "category": prompt.category,
        "value": prompt.value,
        "images": [{"k": image.k, "value": image.value, "reason": image.reason} for image in prompt.images],
    }


def _sweep(sweep: Sweep, sections: Sequence[Section]) -> dict[str, Any]:
    return {
        "benchmark": sweep.benchmark,
        "setting": sweep.setting,
        "lines": [
            {
                "label": line.label,
                "settings": dict(line.shared),
                "drawings": [{"position": position, "name": folder.name} for position, folder in line.points],
            }
            for line in sweep.lines
        ],
        "panels": {
            title: [
                {
                    "label": curve.label,
                    "points": [
                        {"position": position} | _estimate(value)
                        for position, value in zip(curve.positions, curve.values, strict=True)
                    ],
                }
                for curve in curves
            ]
            for title, curves in panels_of(sweep, sections).items()
        },
    }


def _estimate(estimate: Estimate | float) -> dict[str, float | None]:
    if isinstance(estimate, Estimate):
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {"value": estimate, "low": None, "high": None}
