"""Which samples of a source pass `data.filters`, by their sizes and scores, and how many each filter leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.data_schema import DataFilter, DataSource
from bitdance_scale.data.index.index import Index
from bitdance_scale.errors import DataError

_SIZES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "height_px": lambda height, width: height,
    "width_px": lambda height, width: width,
    "short_side_px": np.minimum,
    "long_side_px": np.maximum,
    "pixels": lambda height, width: height.astype(np.int64) * width,
    "aspect": lambda height, width: np.maximum(height, width) / np.minimum(height, width).astype(np.float64),
}


@dataclass(frozen=True)
class FilterCount:
    """What a filter leaves out of the samples that passed the filters before it.

    Attributes:
        rule: the filter.
        num_outside: samples left out because their value is outside the range.
        num_missing: samples left out because they have no value.
        num_kept: samples that remain.
    """

    rule: DataFilter
    num_outside: int
    num_missing: int
    num_kept: int


class SourceFilters:
    """The filters of a source.

    Args:
        index: the data set.
        source: the source.
        filters: all filters of the run.

    Attributes:
        rules: those of the source, in their order.

    Raises:
        DataError: a filter names a column that the index does not have.
    """

    def __init__(self, index: Index, source: DataSource, filters: Sequence[DataFilter]) -> None:
        self._index = index
        self.rules = tuple(rule for rule in filters if rule.source in ("", source.name))
        for rule in self.rules:
            if rule.column not in _SIZES and rule.column not in index.scores:
                found = ", ".join(index.scores) or "none"
                raise DataError(
                    f"data.filters: {rule.column!r} is neither a size nor a numeric field of the records. Sizes are "
                    f"{', '.join(_SIZES)}; fields found: {found}. Correct data.filters[].column."
                )

    def apply(self, part: slice, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which samples pass, and what each rule leaves out.

        Args:
            part: the samples.
            height: uint16 [n], heights of their pictures in pixels.
            width: uint16 [n], widths.

        Returns:
            Bool [n]; samples outside the range of each rule among those that passed the rules before it, int64 [rules];
            samples without a value among them, int64 [rules].
        """
        outside, missing = np.zeros(len(self.rules), np.int64), np.zeros(len(self.rules), np.int64)
        is_kept = np.ones(len(height), bool)
        for number, rule in enumerate(self.rules):
            num_before = np.count_nonzero(is_kept)
            if rule.column in _SIZES:
                values = _SIZES[rule.column](height, width)
            else:
                values = self._index.score(rule.column, part)
                is_missing = np.isnan(values)
                missing[number] = np.count_nonzero(is_kept & is_missing) if rule.missing == "drop" else 0
            # A comparison with NaN is false.
            is_inside = (values >= rule.min) & (values <= rule.max)
            if rule.column not in _SIZES and rule.missing != "drop":
                is_inside |= is_missing
            is_kept &= is_inside
            outside[number] = num_before - np.count_nonzero(is_kept) - missing[number]
        return is_kept, outside, missing


def describe(count: FilterCount) -> str:
    """One line that says what a filter leaves out."""
    rule = count.rule
    low = f"{rule.min:g} <= " if rule.min > float("-inf") else ""
    high = f" <= {rule.max:g}" if rule.max < float("inf") else ""
    missing = f"{count.num_missing:,} without a value" if rule.missing == "drop" else "none for a missing value"
    return f"{low}{rule.column}{high}: leaves out {count.num_outside:,} by value and {missing}; {count.num_kept:,} left"
