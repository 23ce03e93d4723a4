"""Drawings of one benchmark by one metric: values, differences to a baseline, and the prompts to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.benchmarks.manifest import flat_values
from bitdance_scale.evaluation.metrics.catalogue import METRICS
from bitdance_scale.evaluation.metrics.estimate import Difference, Estimate, differences, estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL, Metric
from bitdance_scale.evaluation.metrics.score_file import Scores, scores_path
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder

_PAIRED_BY = {"prompts_sha256": "prompts", "seed": "seed", "images_per_prompt": "images per prompt"}
"""What two drawings must share for their images to be compared one by one, and what it is called."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptScore:
    """A prompt with the scores of its images.

    Attributes:
        prompt_id: of the prompt.
        text: of the prompt.
        category: of the prompt.
        value: mean value of its images, unscaled; higher is better.
        images: in the order of their numbers.
    """

    prompt_id: str
    text: str
    category: str
    value: float
    images: tuple[ImageScore, ...]


@dataclass(frozen=True)
class Value:
    """A value of a drawing.

    Attributes:
        estimate: in the metric's scale.
        num_prompts: prompts that it is of.
    """

    estimate: Estimate
    num_prompts: int


@dataclass(frozen=True)
class Result:
    """What a metric says of a drawing.

    Attributes:
        folder: the drawing.
        scores: as they were read.
        values: by category, the overall value first; none where images have no values of their own.
        figures: values without intervals, in the metric's scale.
        worst: prompts of the lowest value, lowest first.
    """

    folder: ScoredFolder
    scores: Scores = field(repr=False)
    values: Mapping[str, Value]
    figures: Mapping[str, float]
    worst: tuple[PromptScore, ...]


@dataclass(frozen=True)
class Contrast:
    """A prompt in two drawings."""

    baseline: PromptScore
    model: PromptScore

    @property
    def difference(self) -> float:
        """What the model has more."""
        return self.model.value - self.baseline.value


@dataclass(frozen=True)
class Pair:
    """A drawing beside the baseline.

    Attributes:
        baseline, model: names.
        reasons: why they are not compared prompt by prompt; empty where they are.
        differences: by category, in the metric's scale: model minus baseline.
        contrasts: prompts of the largest differences, largest first.
    """

    baseline: str
    model: str
    reasons: tuple[str, ...]
    differences: Mapping[str, Difference]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Section:
    """All drawings of a benchmark that have scores of a metric.

    Attributes:
        benchmark: its name; empty for folders of images of none.
        metric: the metric.
        results: by name of the drawing.
        pairs: every drawing but the baseline beside it.
    """

    benchmark: str
    metric: Metric
    results: Mapping[str, Result]
    pairs: tuple[Pair, ...]

    @property
    def categories(self) -> list[str]:
        """Names of all values, the overall one first."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result.values))

    @property
    def figures(self) -> list[str]:
        """Names of all values without intervals."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result.figures))


def compare(folders: Sequence[ScoredFolder], baseline: str, num_shown: int) -> list[Section]:
    """The sections of a report, by benchmark in the order of the folders and by metric in that of the catalogue.

    Args:
        folders: the drawings.
        baseline: name of the drawing that others are compared with; a section without it takes its first.
        num_shown: prompts of a kind to look at.

    Raises:
        DataError: a file of scores lacks what its metric is made of.
    """
    sections = []
    for benchmark in dict.fromkeys(folder.benchmark for folder in folders):
        for metric in METRICS:
            having = [folder for folder in folders if folder.benchmark == benchmark and metric.name in folder.scores]
            if not having:
                continue
            results = {folder.name: _result(folder, metric, num_shown) for folder in having}
            first = results.get(baseline) or results[having[0].name]
            others = [result for result in results.values() if result is not first]
            pairs = tuple(_pair(first, other, metric, num_shown) for other in others)
            sections.append(Section(benchmark, metric, results, pairs))
    return sections


def prompt_scores(scores: Scores) -> list[PromptScore]:
    """The prompts that have scored images, in the order of the benchmark."""
    images: dict[str, list[ImageScore]] = {}
    for image in scores.images:
        images.setdefault(image.prompt_id, []).append(image)
    return [
        PromptScore(
            prompt_id,
            text,
            images[prompt_id][0].category,
            float(np.mean([image.value for image in images[prompt_id]])),
            tuple(sorted(images[prompt_id], key=lambda image: image.k)),
        )
        for prompt_id, text in scores.prompts.items()
        if prompt_id in images
    ]


def _result(folder: ScoredFolder, metric: Metric, num_shown: int) -> Result:
    scores = folder.scores[metric.name]
    figures = {name: metric.scale * value for name, value in scores.figures.items()}
    if not scores.images:
        return Result(folder, scores, {}, figures, ())
    try:
        found = estimates(scores.images, metric.combine)
    except LookupError as error:
        found, lacking = {}, str(error)
    else:
        lacking = OVERALL if np.isnan(found[OVERALL].value) else ""
    if lacking:
        raise DataError(
            f"{scores_path(folder.root, metric.name)}: no image has what {metric.name} is made of (no part {lacking}); "
            "score the drawing again"
        )
    prompts = prompt_scores(scores)
    having = Counter(name for prompt in prompts for name in {name for image in prompt.images for name in image.parts})
    values = {name: Value(_scaled(one, metric.scale), having.get(name, len(prompts))) for name, one in found.items()}
    worst = _lowest(prompts, lambda prompt: prompt.value, lambda prompt: prompt.category, num_shown)
    return Result(folder, scores, values, figures, tuple(worst))


def _pair(first: Result, second: Result, metric: Metric, num_shown: int) -> Pair:
    names = first.folder.name, second.folder.name
    reasons = _reasons(first, second)
    if reasons:
        return Pair(*names, tuple(reasons), {}, ())
    found = {
        name: replace(one, estimate=_scaled(one.estimate, metric.scale))
        for name, one in differences(first.scores.images, second.scores.images, metric.combine).items()
    }
    before = {prompt.prompt_id: prompt for prompt in prompt_scores(first.scores)}
    both = [
        Contrast(before[prompt.prompt_id], prompt)
        for prompt in prompt_scores(second.scores)
        if prompt.prompt_id in before
    ]
    differing = [contrast for contrast in both if contrast.difference]
    largest = _lowest(
        differing,
        lambda contrast: -abs(contrast.difference),
        lambda contrast: (contrast.difference > 0, contrast.model.category),
        num_shown,
    )
    return Pair(*names, (), found, tuple(largest))


def _reasons(first: Result, second: Result) -> list[str]:
    """Why two drawings are not compared prompt by prompt."""
    sides = (first, second)
    unknown = [side.folder.name for side in sides if not side.folder.drawing]
    if unknown:
        return [f"what {' and '.join(unknown)} was drawn with is not known, as there was no drawing.json"]
    before, after = (side.folder.drawing for side in sides)
    reasons = []
    for key, title in _PAIRED_BY.items():
        if before.get(key) != after.get(key):
            values = "" if key == "prompts_sha256" else f": {before.get(key)} and {after.get(key)}"
            reasons.append(f"other {title}{values}")
    scorers = [flat_values(side.scores.scorer) for side in sides]
    reasons += [
        f"scored otherwise: {key} is {scorers[0].get(key)!r} and {scorers[1].get(key)!r}"
        for key in {**scorers[0], **scorers[1]}
        if scorers[0].get(key) != scorers[1].get(key)
    ]
    if not (first.scores.images and second.scores.images):
        reasons.append("images have no values of their own")
    elif {image.prompt_id for image in first.scores.images}.isdisjoint(
        image.prompt_id for image in second.scores.images
    ):
        reasons.append("no prompt is scored in both")
    return reasons


def _lowest(
    items: Sequence[Item], value: Callable[[Item], float], kind: Callable[[Item], Any], number: int
) -> list[Item]:
    """The items of lowest value, lowest first; of equal ones every kind has its turn, each in the order given."""
    turns: Counter[Any] = Counter()
    ranked = []
    for place, item in enumerate(items):
        group = value(item), kind(item)
        ranked.append((value(item), turns[group], place))
        turns[group] += 1
    return [items[place] for _, _, place in sorted(ranked)[:number]]


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    return Estimate(scale * estimate.value, scale * estimate.low, scale * estimate.high)
