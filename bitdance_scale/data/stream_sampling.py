"""Samples out of streams, for one replica: read in order, checked, held in a buffer, and drawn for a resolution."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import xxhash

from bitdance_scale.config.data_schema import DataSection, DataSource, Resolution
from bitdance_scale.data.captions import CaptionSource, Found
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.images.header import sniff
from bitdance_scale.data.index.grouping import IMAGE_EXTENSIONS, is_ambiguous
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.shard_scan import parse_record
from bitdance_scale.data.plan.buckets import assign_buckets, resolution_buckets
from bitdance_scale.data.plan.filters import SourceFilters
from bitdance_scale.data.storage.streams import BrokenStreamError, TarStream
from bitdance_scale.errors import DataError

logger = logging.getLogger(__name__)

# Samples that are assigned to buckets at once.
_CHUNK = 16
MAX_FRUITLESS = 10_000
"""Samples read in a row, after which a resolution that none of them fits is an error."""


@dataclass(frozen=True)
class StreamSample:
    """A sample as a stream has it.

    Attributes:
        key: a hash of the stream and the name; 0 <= key < 2^63.
        name: its key in the tar.
        shard: the stream.
        image: the bytes of the image file.
        size_px: (height, width), upright.
        captions: what was found for each of `data.captions`.
        record: the `.json`; empty without one.
    """

    key: int
    name: str
    shard: str
    image: bytes
    size_px: tuple[int, int]
    captions: tuple[Found, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class StreamProblem:
    """Something that cannot be trained.

    Attributes:
        error: what is wrong.
        shard: the stream.
        name: of the sample, or of the last one before the stream broke.
        num_samples: how many samples are lost by it, as far as one can tell.
    """

    error: SampleError
    shard: str
    name: str
    num_samples: int = 1


class SourceStream:
    """The endless samples of one source on one replica, each with the bucket of every resolution; see `draw`.

    Args:
        urls: the streams of the source, of all replicas.
        source: the source.
        data: the data section.
        replica: (number of this replica, number of replicas).
        seed: decides the order; the same on all replicas.

    Raises:
        DataError: there are fewer streams than replicas.
    """

    def __init__(
        self, urls: Sequence[str], source: DataSource, data: DataSection, replica: tuple[int, int], seed: str
    ) -> None:
        self._urls, self._data, self._replica = list(urls), data, replica
        self._random = random.Random(f"{seed} {source.name} {replica[0]}")
        # The replicas take different streams of one order.
        self._order = random.Random(f"{seed} {source.name} order")
        self._captions = [CaptionSource.parse(choice.source) for choice in data.captions]
        self._scores = _AnyScore()
        self._filters = SourceFilters(cast(Index, self._scores), source, data.filters)
        self._buckets = {r.side_px: resolution_buckets(r) for r in data.resolutions if r.share > 0}
        self._buffer: list[tuple[StreamSample, dict[int, tuple[int, int]]]] = []
        self._num_read = 0
        self._problems: list[StreamProblem] = []
        self._open: TarStream | None = None
        self._is_stopped = threading.Event()
        self._num_unfit = 0
        self._mean_samples = 0.0
        self._num_whole = 0
        if len(urls) < replica[1] and not data.stream_resampled:
            raise DataError(
                f"data.shards: {len(urls)} streams for {replica[1]} replicas, and each needs one of its own; make more "
                "and smaller shards, or set data.stream_resampled = true"
            )
        self._samples = self._checked()

    def stop(self) -> None:
        """Ends the stream that is being read, from another thread."""
        self._is_stopped.set()
        if self._open is not None:
            self._open.stop()

    def take_counts(self) -> tuple[int, list[StreamProblem]]:
        """Samples that were read since the last call, or that should have been, and what went wrong with some of them.

        Those that the filters leave out have been read, too.
        """
        counts = self._num_read, self._problems
        self._num_read, self._problems = 0, []
        return counts

    def draw(self, resolution: Resolution) -> tuple[StreamSample, tuple[int, int]]:
        """A sample for a resolution, at random out of the buffer, and its bucket.

        Samples that do not fit the resolution stay for others; if the whole buffer is of them, the oldest makes room.

        Raises:
            DataError: no sample fits for too long, or no stream can be read.
        """
        side_px = resolution.side_px
        while len(self._buffer) < self._data.stream_buffer:
            self._fill()
        start = self._random.randrange(len(self._buffer))
        for offset in range(len(self._buffer)):
            place = (start + offset) % len(self._buffer)
            sample, buckets = self._buffer[place]
            if side_px in buckets:
                # The last one takes its place, so that nothing is moved.
                self._buffer[place] = self._buffer[-1]
                self._buffer.pop()
                return sample, buckets[side_px]
        for _ in range(0, MAX_FRUITLESS, _CHUNK):
            before = len(self._buffer)
            self._fill()
            for place in range(before, len(self._buffer)):
                sample, buckets = self._buffer[place]
                if side_px in buckets:
                    self._buffer.pop(place)
                    self._make_room()
                    return sample, buckets[side_px]
            self._make_room()
        raise DataError(
            f"data.resolutions: none of the last {MAX_FRUITLESS} samples fills a bucket of resolution {side_px} px "
            f"with data.max_upscale={self._data.max_upscale:g}. Set the share of the resolution to 0, give it smaller "
            "buckets, or add larger images."
        )

    def _make_room(self) -> None:
        del self._buffer[: max(0, len(self._buffer) - self._data.stream_buffer)]

    def _fill(self) -> None:
        """Adds some samples to the buffer: those that fit any resolution."""
        samples = [next(self._samples) for _ in range(_CHUNK)]
        sizes = np.array([sample.size_px for sample in samples], np.int32)
        buckets: list[dict[int, tuple[int, int]]] = [{} for _ in samples]
        for side_px, of_resolution in self._buckets.items():
            rows = assign_buckets(sizes[:, 0], sizes[:, 1], of_resolution, self._data.max_upscale).tolist()
            for found, row in zip(buckets, rows, strict=True):
                if row >= 0:
                    height, width = of_resolution[row].tolist()
                    found[side_px] = (height, width)
        fitting = [(sample, found) for sample, found in zip(samples, buckets, strict=True) if found]
        self._buffer += fitting
        self._num_unfit = 0 if fitting else self._num_unfit + _CHUNK
        if self._num_unfit >= MAX_FRUITLESS:
            raise DataError(
                f"data.resolutions: none of the last {MAX_FRUITLESS} samples fills a bucket of any resolution with "
                f"data.max_upscale={self._data.max_upscale:g}; the latest has (height, width) {samples[-1].size_px}. "
                "Add larger images, or a resolution with smaller buckets."
            )

    def _checked(self) -> Iterator[StreamSample]:
        """The samples that can be trained and pass the filters, without end."""
        num_fruitless, last = 0, ""
        for url, members in self._members():
            self._num_read += 1
            try:
                sample = read_sample(members, url, self._captions)
                last = f"{url}: the filters leave out {sample.name}"
                if self._passes(sample):
                    num_fruitless = 0
                    yield sample
                    continue
            except SampleError as error:
                name = str(members["__key__"])
                self._problems.append(StreamProblem(error, url, name))
                last = f"{url}: sample {name}: {error}"
            num_fruitless += 1
            if num_fruitless == MAX_FRUITLESS:
                raise DataError(
                    f"data.shards: {MAX_FRUITLESS} samples in a row cannot be used, or are left out by data.filters. "
                    f"Latest: {last}. Correct the filters or the shards."
                )

    def _members(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(stream, members) of the samples of this replica's streams, in order, without end."""
        num_empty, problem = 0, "it holds no samples"
        for url in self._next_urls():
            num_samples, name = 0, ""
            self._open = TarStream(url)
            if self._is_stopped.is_set():
                return
            try:
                for members in self._open:
                    num_samples, name = num_samples + 1, str(members["__key__"])
                    num_empty = 0
                    yield url, members
                self._num_whole += 1
                self._mean_samples += (num_samples - self._mean_samples) / self._num_whole
            except BrokenStreamError as error:
                if self._is_stopped.is_set():
                    return
                problem = str(error)
                # What a broken stream lacks cannot be counted: as many as it has fewer than the whole ones so far.
                num_lost = max(1, round(self._mean_samples) - num_samples)
                self._num_read += num_lost
                logger.warning("%s: broke after %d samples (last: %s): %s", url, num_samples, name or "none", error)
                self._problems.append(
                    StreamProblem(SampleError(ErrorCause.READ_FAILED, problem), url, name or "(first)", num_lost)
                )
            num_empty += num_samples == 0
            if num_empty > len(self._urls):
                raise DataError(f"data.shards: no stream gives any sample. Latest: {url}: {problem}")

    def _next_urls(self) -> Iterator[str]:
        number, count = self._replica
        while True:
            if self._data.stream_resampled:
                yield self._random.choice(self._urls)
            else:
                order = self._order.sample(self._urls, len(self._urls))
                yield from order[number::count]

    def _passes(self, sample: StreamSample) -> bool:
        if not self._filters.rules:
            return True
        self._scores.record = sample.record
        height, width = (np.array([side], np.int32) for side in sample.size_px)
        is_kept, _, _ = self._filters.apply(slice(0, 1), height, width)
        return bool(is_kept[0])


class _AnyScore:
    """Stands for an index of one sample: what its record says of a column."""

    def __init__(self) -> None:
        self.scores = self
        self.record: dict[str, Any] = {}

    def __contains__(self, column: object) -> bool:
        # Which columns there are is not known before everything is read.
        return True

    def score(self, column: str, samples: slice) -> np.ndarray:
        """float32 [1], NaN where the record has no number."""
        value = self.record.get(column)
        try:
            return np.array([value if isinstance(value, int | float) else np.nan], np.float32)
        except OverflowError:
            return np.array([np.nan], np.float32)


def read_sample(members: dict[str, Any], url: str, captions: Sequence[CaptionSource]) -> StreamSample:
    """Makes a sample of its members, as the index would have it.

    Args:
        members: extension -> content, and `__key__`.
        url: the stream.
        captions: of `data.captions`.

    Raises:
        SampleError: it has no image, or one whose size cannot be read or is not that of its record.
    """
    name = str(members["__key__"])
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is None:
        raise SampleError(ErrorCause.BAD_IMAGE, f"no image among its members ({', '.join(_extensions(members))})")
    if is_ambiguous(members):
        raise SampleError(ErrorCause.BAD_IMAGE, "a .jpg and a .jpeg, of which only one can be its image")
    header = sniff(image)
    if header is None:
        raise SampleError(ErrorCause.BAD_IMAGE, f"its {len(image)} bytes are no JPEG, PNG or WebP")
    texts = {extension: members[extension] for extension in _extensions(members)}
    fields = {"json", *(caption.extension for caption in captions if caption.field is not None)}
    records = {extension: parse_record(texts[extension]) or {} for extension in fields if extension in texts}
    record = records.get("json", {})
    stated = (record.get("height"), record.get("width"))
    is_stated = all(type(side) is int and side > 0 for side in stated)
    if is_stated and stated not in (header.stored_px, header.upright_px):
        raise SampleError(ErrorCause.SIZE_MISMATCH, f"the image is {header.stored_px} pixels, its record says {stated}")
    return StreamSample(
        key=xxhash.xxh3_64_intdigest(f"{url}\0{name}".encode("utf-8", "surrogateescape")) >> 1,
        name=name,
        shard=url,
        image=image,
        size_px=header.upright_px,
        captions=tuple(caption.find(name.encode("utf-8", "surrogateescape"), texts, records) for caption in captions),
        record=record,
    )


def _extensions(members: dict[str, Any]) -> list[str]:
    return [name for name in members if not name.startswith("__")]
