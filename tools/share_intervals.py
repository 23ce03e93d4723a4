"""Intervals of shares of right pictures, which do not shrink to nothing when no picture is right, or every one.

A share has Wilson's interval (1927), and a mean of shares the one that is put together from theirs (Zou and Donner
2008, 10.1002/sim.3095). Both are of 95 %, and take pictures for independent of each other: one picture of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.metrics.metric import OVERALL

_QUANTILE = 1.959964
"""Of the normal distribution, at 97.5 %."""


def share(value: float, num_pictures: int) -> Estimate:
    """A share of `num_pictures` pictures with its interval."""
    square = _QUANTILE**2 / num_pictures
    middle = (value + square / 2) / (1 + square)
    reach = math.sqrt(square * value * (1 - value) + square**2 / 4) / (1 + square)
    return Estimate(value, max(0.0, min(value, middle - reach)), min(1.0, max(value, middle + reach)))


def shares(correct: Mapping[str, float], num_pictures: int) -> dict[str, Estimate]:
    """The share of each category, and their mean as `overall`, which comes first.

    Args:
        correct: category -> share of right pictures.
        num_pictures: of all categories together, which have equally many.
    """
    found = {name: share(value, num_pictures // len(correct)) for name, value in correct.items()}
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in found.values())) / len(found)
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in found.values())) / len(found)
    mean = sum(correct.values()) / len(found)
    return {OVERALL: Estimate(mean, mean - below, mean + above), **found}
