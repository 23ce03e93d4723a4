"""What a metric is: its name, its unit, and how its values come from its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OVERALL = "overall"
"""The value that a metric is quoted by."""

Combine = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Values by name from parts by name, float64 [n] each; `OVERALL` is one of the values.

A value is not a number where a part that it is made of is none.
"""


@dataclass(frozen=True)
class Metric:
    """A metric of drawings.

    Attributes:
        name: in commands, files and logs.
        title: for readers.
        benchmarks: names of the benchmarks that it is of; none: any.
        scale: what a value is multiplied by for readers: 100 for percent, 1 otherwise.
        combine: its values from its parts.
        is_lower_better: as of distances.
    """

    name: str
    title: str
    benchmarks: tuple[str, ...]
    scale: float
    combine: Combine
    is_lower_better: bool = False


def mean_of(names: Sequence[str]) -> Combine:
    """The overall value is the mean of the parts of these names that are there; all parts are values, these first."""

    def combine(parts: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        averaged = {name: parts[name] for name in names if name in parts}
        return {OVERALL: np.mean([*averaged.values()], axis=0), **averaged, **parts}

    return combine


def as_parts(parts: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The values are the parts, of which one is the overall value; the others follow in the order of their names."""
    return {OVERALL: parts[OVERALL], **{name: parts[name] for name in sorted(parts)}}
