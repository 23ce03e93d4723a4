"""Which samples of a source pass `data.filters`, by their sizes and scores, and how many each filter leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import DataFilter, DataSource
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.buckets import SAMPLES_PER_CHUNK, content_px
from bitdance_scale.errors import DataError

_Sides = tuple[np.ndarray, np.ndarray]
_SIZES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "height_px": lambda height, width: height,
    "width_px": lambda height, width: width,
    "short_side_px": np.minimum,
    "long_side_px": np.maximum,
    "pixels": lambda height, width: height.astype(np.int64) * width,
    "aspect": lambda height, width: np.maximum(height, width) / np.minimum(height, width),
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


class KeptSamples:
    """The samples of a source that pass all of its filters.

    Args:
        index: the data set.
        samples: positions of the samples of the source.
        source: the source.
        filters: all filters of the run.

    Attributes:
        counts: what each filter of the source leaves out, in their order.

    Raises:
        DataError: a filter names a column that the index does not have.
    """

    def __init__(self, index: Index, samples: range, source: DataSource, filters: Sequence[DataFilter]) -> None:
        rules = [rule for rule in filters if rule.source in ("", source.name)]
        for rule in rules:
            if rule.column not in _SIZES and rule.column not in index.scores:
                found = ", ".join(index.scores) or "none"
                raise DataError(
                    f"data.filters: {rule.column!r} is neither a size nor a numeric field of the records. Sizes are "
                    f"{', '.join(_SIZES)}; fields found: {found}. Correct data.filters[].column."
                )
        outside, missing = np.zeros(len(rules), np.int64), np.zeros(len(rules), np.int64)
        chunks = []
        for start in range(samples.start, samples.stop if rules else samples.start, SAMPLES_PER_CHUNK):
            part = slice(start, min(start + SAMPLES_PER_CHUNK, samples.stop))
            sides = content_px(index, part, source.has_borders)
            is_kept = np.ones(part.stop - part.start, bool)
            for number, rule in enumerate(rules):
                values = _SIZES[rule.column](*sides) if rule.column in _SIZES else index.score(rule.column)[part]
                is_missing = np.isnan(values)
                is_outside = ~is_missing & ((values < rule.min) | (values > rule.max))
                is_missing &= rule.missing == "drop"
                outside[number] += np.count_nonzero(is_kept & is_outside)
                missing[number] += np.count_nonzero(is_kept & is_missing)
                is_kept &= ~(is_outside | is_missing)
            chunks.append(np.packbits(is_kept))
        left = len(samples) - np.cumsum(outside + missing)
        counts = zip(rules, outside.tolist(), missing.tolist(), left.tolist(), strict=True)
        self.counts = [FilterCount(*count) for count in counts]
        # All chunks but the last are whole bytes.
        self._bitmap = np.concatenate(chunks) if rules else None

    def __call__(self, part: slice) -> np.ndarray | bool:
        """Bool [n], which samples pass, for a range of the source that starts at a multiple of the chunk; True: all."""
        if self._bitmap is None:
            return True
        start, count = part.start // 8, part.stop - part.start
        return np.unpackbits(self._bitmap[start : start + -(-count // 8)], count=count).astype(bool)

    def of(self, numbers: np.ndarray) -> np.ndarray | bool:
        """Bool [n], which samples pass, for any samples by their numbers in the source; True: all."""
        if self._bitmap is None:
            return True
        return (self._bitmap[numbers >> 3] >> (7 - (numbers & 7)).astype(np.uint8)) & 1 == 1


def describe(count: FilterCount) -> str:
    """One line that says what a filter leaves out."""
    rule = count.rule
    low = f"{rule.min:g} <= " if rule.min > float("-inf") else ""
    high = f" <= {rule.max:g}" if rule.max < float("inf") else ""
    missing = f"{count.num_missing:,} without a value" if rule.missing == "drop" else "none for a missing value"
    return f"{low}{rule.column}{high}: leaves out {count.num_outside:,} by value and {missing}; {count.num_kept:,} left"
