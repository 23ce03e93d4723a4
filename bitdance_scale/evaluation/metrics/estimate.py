"""Values with intervals, and differences of two drawings of the same prompts.

Intervals are those of the bootstrap over prompts within each category (Efron and Tibshirani 1993), since images of one
prompt are alike. A difference is resampled with the same prompts on both sides, so that how hard a prompt is cancels.
Prompts with the same questions are one (`ImageScore.unit`).

The bootstrap says too little of few prompts. Where all are right, or none is, it finds no spread: a share of 0 or 1 has
Wilson's interval (1927). Where all differences have one sign, so has every resample: only a difference that a sign test
finds as well is clear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import Combine

_LEVEL = 0.95
_SIGNIFICANT = 0.05
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
        num_better, num_worse: prompts of which the second drawing has a higher, or lower, value.
        num_prompts: prompts that the value is of, which have what it is made of.
    """

    estimate: Estimate
    num_better: int
    num_worse: int
    num_prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero, and a two-sided sign test says the same with p < 0.05.

        That takes at least six prompts: with one sign, n of them have p = 2 / 2^n.
        """
        if self.estimate.low > 0:
            agreeing, others = self.num_better, self.num_worse
        elif self.estimate.high < 0:
            agreeing, others = self.num_worse, self.num_better
        else:
            return False
        return agreeing > others and float(binomtest(agreeing, agreeing + others).pvalue) < _SIGNIFICANT


def estimates(images: Sequence[ImageScore], combine: Combine, seed: int = 0) -> dict[str, Estimate]:
    """The values of a metric with their intervals.

    Args:
        images: scores of the images of a drawing.
        combine: of the metric.
        seed: of the resampling.

    Raises:
        ValueError: there are no images.
    """
    prompts = _Prompts(images, _units(images))
    values, parts = _resampled(prompts, combine, seed), _parts_of_values(prompts, combine)
    return {name: _of_end(row, int(prompts.has(parts[name]).sum())) or _estimate(row) for name, row in values.items()}


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
    units = _units([*first, *second])
    before, after = (
        _Prompts([image for image in side if image.prompt_id in shared], units) for side in (first, second)
    )
    old, new = (_resampled(side, combine, seed) for side in (before, after))
    old_parts, new_parts = (_parts_of_values(side, combine) for side in (before, after))
    found = {}
    for name in (name for name in new if name in old):
        change = after.means(new_parts[name]) - before.means(old_parts[name])
        counts = int((change > 0).sum()), int((change < 0).sum()), int((~np.isnan(change)).sum())
        found[name] = Difference(_estimate(new[name] - old[name]), *counts)
    return found


def _units(images: Sequence[ImageScore]) -> dict[str, str]:
    """What every prompt is resampled with; an earlier version's scores lack it where today's have it."""
    own = {image.prompt_id: image.prompt_id for image in images}
    return own | {image.prompt_id: image.unit for image in images if image.unit}


class _Prompts:
    """Images summed up by prompt, in the order of prompt ids; prompts of a unit are one.

    Attributes:
        categories: of each prompt; of several, all of theirs.
        parts: by name, float64 [prompts, 2], sums and weights.

    Args:
        images: one or more.
        units: of every prompt id.
    """

    def __init__(self, images: Sequence[ImageScore], units: Mapping[str, str]) -> None:
        if not images:
            raise ValueError("there are no images to summarise")
        by_unit: dict[str, list[ImageScore]] = {}
        for image in images:
            by_unit.setdefault(units[image.prompt_id], []).append(image)
        prompts = [by_unit[name] for name in sorted(by_unit)]
        self.categories = ["\n".join(sorted({image.category for image in found})) for found in prompts]
        names = dict.fromkeys(name for image in images for name in image.parts)
        self.parts = {name: np.zeros((len(prompts), 2)) for name in names}
        for row, found in enumerate(prompts):
            for image in found:
                for name, added in image.parts.items():
                    self.parts[name][row] += added

    def has(self, parts: Sequence[str]) -> np.ndarray:
        """Which prompts have any of these parts, bool [prompts]."""
        return self._sums(parts)[:, 1] > 0

    def means(self, parts: Sequence[str]) -> np.ndarray:
        """The mean of each prompt over these parts, float64 [prompts]; not a number where it has none."""
        sums, weights = self._sums(parts).T
        return np.divide(sums, weights, out=np.full(len(sums), np.nan), where=weights > 0)

    def _sums(self, parts: Sequence[str]) -> np.ndarray:
        return np.sum([self.parts[name] for name in parts], axis=0)


def _parts_of_values(prompts: _Prompts, combine: Combine) -> dict[str, list[str]]:
    """The parts that each value is made of: those without which it is no number."""
    names = [*prompts.parts]
    lacking = dict(zip(names, np.where(np.eye(len(names), dtype=bool), np.nan, 1.0), strict=True))
    return {value: [names[place] for place in np.flatnonzero(np.isnan(row))] for value, row in combine(lacking).items()}


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
