"""Values with intervals, and differences of two drawings of the same prompts.

Intervals are those of the bootstrap over prompts within each category (Efron and Tibshirani 1993), since images of one
prompt are alike. A difference is resampled with the same prompts on both sides, so that how hard a prompt is cancels.
Where all prompts are right, or none is, resampling finds no spread: a share of 0 or 1 has Wilson's interval (1927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import Combine

_LEVEL = 0.95
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value, and the interval that holds 95 of 100 values of it over other prompts of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a second drawing has more than a first.

    Attributes:
        estimate: second minus first, with its interval.
        num_better, num_worse: prompts of which the second drawing's images have a higher, or lower, mean value.
        num_prompts: prompts compared.
    """

    estimate: Estimate
    num_better: int
    num_worse: int
    num_prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.estimate.low > 0 or self.estimate.high < 0


def estimates(images: Sequence[ImageScore], combine: Combine, seed: int = 0) -> dict[str, Estimate]:
    """The values of a metric with their intervals.

    Args:
        images: scores of the images of a drawing.
        combine: of the metric.
        seed: of the resampling.

    Raises:
        ValueError: there are no images.
    """
    prompts = _Prompts(images)
    values = _resampled(prompts, combine, seed)
    return {name: _of_end(row, prompts.count(name)) or _estimate(row) for name, row in values.items()}


def differences(
    first: Sequence[ImageScore], second: Sequence[ImageScore], combine: Combine, seed: int = 0
) -> dict[str, Difference]:
    """What the second of two drawings has more, on the prompts that both have.

    Args:
        first: scores of the images of the first drawing.
        second: of the second.
        combine: of the metric.
        seed: of the resampling.

    Raises:
        ValueError: no prompt is in both.
    """
    shared = {image.prompt_id for image in first} & {image.prompt_id for image in second}
    sides = [_Prompts([image for image in side if image.prompt_id in shared]) for side in (first, second)]
    before, after = (_resampled(side, combine, seed) for side in sides)
    better = np.sign(np.array(sides[1].values) - np.array(sides[0].values))
    counts = int((better > 0).sum()), int((better < 0).sum()), len(better)
    return {name: Difference(_estimate(after[name] - before[name]), *counts) for name in after if name in before}


class _Prompts:
    """Images summed up by prompt, in the order of prompt ids.

    Attributes:
        categories: of each prompt.
        parts: by name, float64 [prompts, 2], sums and weights.
        values: mean value of the images of each prompt.
    """

    def __init__(self, images: Sequence[ImageScore]) -> None:
        if not images:
            raise ValueError("there are no images to summarise")
        by_prompt: dict[str, list[ImageScore]] = {}
        for image in images:
            by_prompt.setdefault(image.prompt_id, []).append(image)
        prompts = [by_prompt[name] for name in sorted(by_prompt)]
        self.categories = [found[0].category for found in prompts]
        self.values = [float(np.mean([image.value for image in found])) for found in prompts]
        names = dict.fromkeys(name for image in images for name in image.parts)
        self.parts = {name: np.zeros((len(prompts), 2)) for name in names}
        for row, found in enumerate(prompts):
            for image in found:
                for name, added in image.parts.items():
                    self.parts[name][row] += added

    def count(self, name: str) -> int:
        """Prompts that a value is of: those that have the part of this name, or all."""
        part = self.parts.get(name)
        return len(self.values) if part is None else int((part[:, 1] > 0).sum())


def _resampled(prompts: _Prompts, combine: Combine, seed: int) -> dict[str, np.ndarray]:
    """Values by name, float64 [1 + resamples]; the first is that of the prompts as they are."""
    counts = _counts(prompts.categories, seed)
    parts = {}
    for name, rows in prompts.parts.items():
        sums, weights = (counts @ rows).T
        # A part that no resampled prompt has is no number, and is left out of the interval.
        parts[name] = np.divide(sums, weights, out=np.full(len(sums), np.nan), where=weights > 0)
    return dict(combine(parts))


def _counts(categories: Sequence[str], seed: int) -> np.ndarray:
    """How often each prompt is in each resample, float64 [1 + resamples, prompts]; once each in the first."""
    rng = np.random.default_rng(seed)
    counts = np.ones((1 + _NUM_RESAMPLES, len(categories)))
    names = np.array(categories)
    for category in dict.fromkeys(categories):
        (places,) = np.nonzero(names == category)
        counts[1:, places] = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=_NUM_RESAMPLES)
    return counts


def _of_end(values: np.ndarray, num_prompts: int) -> Estimate | None:
    """Of a share that is 0, or 1, in every resample that has it; None: it is no such share."""
    value = float(values[0])
    if value not in (0.0, 1.0) or np.any(values[~np.isnan(values)] != value):
        return None
    interval = binomtest(round(value * num_prompts), num_prompts).proportion_ci(_LEVEL, "wilson")
    return Estimate(value, float(interval.low), float(interval.high))


def _estimate(values: np.ndarray) -> Estimate:
    """Of the value of the prompts as they are, which is the first, and those of the resamples."""
    low, high = np.nanquantile(values[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high))
