"""Which samples each stream of a plan can draw: those large enough for its resolution that pass the filters.

A stream is a source at a resolution. Its samples are a bitmap of N / 8 bytes, computed in one pass over sizes and
scores. At two billion samples that pass takes a while and the bitmaps take hundreds of megabytes. So the first rank of
a job keeps them in a file beside the index, which all ranks of a node map and share. The file is named after everything
that it depends on, so later runs find it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.config.data_schema import DataSection, DataSource, Resolution
from bitdance_scale.data.index.column_file import ColumnFile, digests_of, write_columns
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.segment import SCORE
from bitdance_scale.data.plan.buckets import EligibleSamples, Staircase, content_px, resolution_buckets
from bitdance_scale.data.plan.filters import FilterCount, SourceFilters

logger = logging.getLogger(__name__)

SAMPLES_PER_CHUNK = 1 << 20
MIN_STORED_SAMPLES = 1 << 22
"""Of fewer samples every rank computes the bitmaps by itself, which takes milliseconds."""
_FORMAT = 1
_MAX_THREADS = 16


@dataclass(frozen=True)
class Selection:
    """The samples of all streams of a run.

    Attributes:
        eligible: (number of the source, `side_px`) -> its samples, numbered within the source.
        counts: for each source what its filters leave out.
    """

    eligible: Mapping[tuple[int, int], EligibleSamples]
    counts: Sequence[Sequence[FilterCount]]


def select(index: Index, data: DataSection) -> Selection:
    """The selection of a run: from the file that `store_selection` has made, or computed.

    Args:
        index: the data set, divided into `data.active_sources`.
        data: the data section of the configuration.

    Raises:
        DataError: a filter names a column that the index does not have.
    """
    filters = _filters(index, data)
    if (stored := _stored_path(index, data)) is not None and stored.exists():
        try:
            file = ColumnFile(stored)
            eligible = {
                key: EligibleSamples(file.columns[_name(key, "bits")], file.columns[_name(key, "before")])
                for key in _keys(index, data)
            }
            counts = [
                [FilterCount(rule, *numbers) for rule, numbers in zip(own.rules, found, strict=True)]
                for own, found in zip(filters, file.metadata["counts"], strict=True)
            ]
            return Selection(eligible, counts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: cannot be used (%r); selecting again", stored, error)
    return _compute(index, data, filters)


def store_selection(index: Index, data: DataSection) -> None:
    """Makes the file of a selection, if it is worth one and not there yet. For one process of a job.

    Raises:
        DataError: as `select`.
    """
    path = _stored_path(index, data)
    if path is None:
        return
    digests_path = path.with_suffix(".json")
    try:
        if path.exists() and orjson.loads(digests_path.read_bytes()) == digests_of(path):
            return
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be used (%r); selecting again", path, error)
    selection = _compute(index, data, _filters(index, data))
    columns: dict[str, np.ndarray] = {}
    for key, eligible in selection.eligible.items():
        columns |= {_name(key, "bits"): eligible.groups, _name(key, "before"): eligible.before}
    counts = [[dataclasses.astuple(count)[1:] for count in found] for found in selection.counts]
    try:
        digests = write_columns(path, columns, {"counts": counts})
        write_bytes(digests_path, orjson.dumps(digests), is_shared=True)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); every rank selects by itself", path, error.strerror)


def _stored_path(index: Index, data: DataSection) -> Path | None:
    """File of the selection; None where none is made."""
    if index.table is None or len(index) < MIN_STORED_SAMPLES:
        return None
    filters = [(dataclasses.astuple(rule), index.digests.get(SCORE + rule.column)) for rule in data.filters]
    sources = [(source.name, source.has_borders) for source in data.active_sources]
    ranges = [(samples.start, samples.stop) for samples in index.sources]
    resolutions = [(r.side_px, resolution_buckets(r).tolist()) for r in _resolutions(data)]
    decisive = [_FORMAT, index.hash, filters, sources, ranges, resolutions, data.max_upscale]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    return index.table.with_name(f"selection_{digest}.safetensors")


def _resolutions(data: DataSection) -> list[Resolution]:
    return [resolution for resolution in data.resolutions if resolution.share > 0]


def _keys(index: Index, data: DataSection) -> list[tuple[int, int]]:
    return [(source, r.side_px) for source in range(len(index.sources)) for r in _resolutions(data)]


def _name(key: tuple[int, int], part: str) -> str:
    return f"{key[0]}.{key[1]}.{part}"


def _filters(index: Index, data: DataSection) -> list[SourceFilters]:
    return [SourceFilters(index, source, data.filters) for source in data.active_sources]


def _compute(index: Index, data: DataSection, filters: Sequence[SourceFilters]) -> Selection:
    eligible: dict[tuple[int, int], EligibleSamples] = {}
    counts = []
    for number, (samples, source) in enumerate(zip(index.sources, data.active_sources, strict=True)):
        work = _SourceSelection(index, samples, source, filters[number], _resolutions(data), data.max_upscale)
        found, outside, missing = work.run()
        eligible |= {(number, side_px): bitmap for side_px, bitmap in found.items()}
        left = len(samples) - np.cumsum(outside + missing)
        numbers = zip(filters[number].rules, outside.tolist(), missing.tolist(), left.tolist(), strict=True)
        counts.append([FilterCount(*each) for each in numbers])
    return Selection(eligible, counts)


class _Chunk(NamedTuple):
    """Of some samples the bits of every resolution by `side_px`, and what each filter leaves out, int64 [f]."""

    bits: dict[int, np.ndarray]
    outside: np.ndarray
    missing: np.ndarray


class _SourceSelection:
    """One pass over the samples of a source for all resolutions."""

    def __init__(
        self,
        index: Index,
        samples: range,
        source: DataSource,
        filters: SourceFilters,
        resolutions: Sequence[Resolution],
        max_upscale: float,
    ) -> None:
        self._index, self._samples, self._has_borders, self._filters = index, samples, source.has_borders, filters
        self._staircases = {r.side_px: Staircase(resolution_buckets(r), max_upscale) for r in resolutions}

    def run(self) -> tuple[dict[int, EligibleSamples], np.ndarray, np.ndarray]:
        """`side_px` -> eligible samples; and what each filter leaves out by value and for want of one, int64 [f]."""
        starts = range(self._samples.start, self._samples.stop, SAMPLES_PER_CHUNK)
        num_threads = max(1, min(len(starts), len(os.sched_getaffinity(0)), _MAX_THREADS))
        # All chunks but the last are whole bytes. numpy releases the interpreter lock.
        with ThreadPoolExecutor(num_threads) as pool:
            chunks = list(pool.map(self._chunk, starts))
        outside, missing = np.zeros((2, len(self._filters.rules)), np.int64)
        for chunk in chunks:
            outside += chunk.outside
            missing += chunk.missing
        empty = np.zeros(0, np.uint8)
        bitmaps = {
            side_px: EligibleSamples.of_bits(np.concatenate([empty, *(chunk.bits[side_px] for chunk in chunks)]))
            for side_px in self._staircases
        }
        return bitmaps, outside, missing

    def _chunk(self, start: int) -> _Chunk:
        part = slice(start, min(start + SAMPLES_PER_CHUNK, self._samples.stop))
        # Sides fit 16 bits, in which comparisons are fastest.
        height, width = content_px(self._index, part, self._has_borders).T.astype(np.uint16, order="C")
        is_kept, outside, missing = self._filters.apply(part, height, width)
        bits = {
            side_px: np.packbits(staircase.covers(height, width) & is_kept)
            for side_px, staircase in self._staircases.items()
        }
        return _Chunk(bits, outside, missing)
