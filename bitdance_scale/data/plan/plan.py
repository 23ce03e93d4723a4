"""The plan: which samples make up which global batch, as a pure function of (seed, index, configuration, step).

For every resolution, every source is a stream that goes through its eligible samples epoch after epoch, each epoch in
another order. A global batch takes exactly its share from every resolution, and a resolution exactly its share from
every source. The plan keeps no state between batches and does not depend on ranks, so a run resumes at any step, on any
number of ranks, with the same batches.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.data_schema import DataSection, Resolution
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import chunks
from bitdance_scale.data.index.segment import SCORE
from bitdance_scale.data.index.shard_scan import caption_column
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.buckets import EligibleSamples, assign_buckets, content_px, resolution_buckets
from bitdance_scale.data.plan.filters import FilterCount
from bitdance_scale.data.plan.permutation import Permutation, uniform
from bitdance_scale.data.plan.selection import Selection, select
from bitdance_scale.errors import DataError


class _Draw(enum.IntEnum):
    """What a random number of the plan is for; part of its key."""

    ORDER = 1
    CAPTION_DROP = 2
    IMAGE_TO_TEXT = 3
    CAPTION = 4
    ALTERNATIVE = 5


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch of B samples, in order.

    Attributes:
        step: optimiser step it is for, from 0.
        samples: int64 [B], position in the index, which is the key of the sample.
        side_px: int32 [B], `side_px` of the resolution.
        bucket_px: int32 [B, 2], (height, width) at which the image is trained.
        source: int16 [B], number of the source in `data.active_sources`.
        epoch: int64 [B], how often the source has gone through its samples of the resolution.
        is_caption_dropped: bool [B], trained without its caption, by chance (guidance) or because it has none.
        is_image_to_text: bool [B], trained to describe the image; never together with a dropped caption.
        caption: int8 [B], number in `data.captions` of the caption that was drawn; -1 if the sample has none.
        alternative: float64 [B] in [0, 1), which of the alternatives of the caption is taken.
    """

    step: int
    samples: np.ndarray
    side_px: np.ndarray
    bucket_px: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    is_caption_dropped: np.ndarray
    is_image_to_text: np.ndarray
    caption: np.ndarray
    alternative: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class StreamUse:
    """What a number of steps takes of one source at one resolution.

    Attributes:
        source: name of the source; empty for `data.shards`.
        side_px: `side_px` of the resolution.
        num_samples: samples that the stream draws from; 0 if the other sources take its share.
        num_images: images drawn.
    """

    source: str
    side_px: int
    num_samples: int
    num_images: int

    @property
    def epochs(self) -> float:
        """How often the stream goes through its samples."""
        return self.num_images / max(1, self.num_samples)


class Plan:
    """Plans the global batches of a run.

    Args:
        seed: seed of the run.
        index: the data set, divided into `data.active_sources`.
        data: the data section of the configuration.

    Raises:
        DataError: a resolution has no sample that is large enough for it, or a source has none for any resolution, or a
            filter names a column that the index does not have.
    """

    def __init__(self, seed: int, index: Index, data: DataSection) -> None:
        resolutions = [resolution for resolution in data.resolutions if resolution.share > 0]
        self._index = index
        self._data = data
        self._seed = seed
        self._apportionment = Apportionment([resolution.share for resolution in resolutions])
        self._selection = select(index, data)
        self._mixes = [_SourceMix(seed, index, resolution, data, self._selection) for resolution in resolutions]
        self.hash = _plan_hash(seed, index, data)
        used = {stream.source for mix in self._mixes for stream in mix.streams}
        for number, source in enumerate(data.active_sources):
            if number not in used:
                raise DataError(
                    f"data.sources: none of the {len(index.sources[number])} images of source {source.name!r} fills a "
                    f"bucket of any resolution with data.max_upscale={data.max_upscale:g} and passes data.filters, so "
                    "its share cannot be kept. Set its share to 0, add larger images to it, add a resolution with "
                    "smaller buckets, raise data.max_upscale or widen the filters."
                )

    @property
    def num_eligible(self) -> dict[int, int]:
        """Samples that each resolution draws from, by `side_px`."""
        return {mix.side_px: sum(stream.num_samples for stream in mix.streams) for mix in self._mixes}

    def filter_counts(self) -> dict[str, list[FilterCount]]:
        """What the filters leave out, by source."""
        names = [source.name for source in self._data.active_sources]
        return {name: list(counts) for name, counts in zip(names, self._selection.counts, strict=True)}

    def buckets_px(self, samples: np.ndarray, side_px: int) -> np.ndarray:
        """int32 [n, 2], (height, width) at which a resolution trains each sample; 0 for samples that it never draws."""
        buckets = np.zeros((len(samples), 2), np.int32)
        for stream in next(mix for mix in self._mixes if mix.side_px == side_px).streams:
            own = self._index.sources[stream.source]
            places = np.flatnonzero((samples >= own.start) & (samples < own.stop))
            places = places[stream.is_drawn(samples[places])]
            buckets[places] = stream.buckets_px(samples[places])
        return buckets

    def source_of(self, sample: int) -> int:
        """Number in `data.active_sources` of the source of a sample."""
        return next(number for number, samples in enumerate(self._index.sources) if sample in samples)

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of an optimiser step, 0 <= step."""
        start, stop = step * self._data.global_batch, (step + 1) * self._data.global_batch
        labels = self._apportionment.labels(start, stop)
        first = self._apportionment.counts_before(start)
        size = len(labels)
        samples, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        sides, buckets = np.empty(size, np.int32), np.empty((size, 2), np.int32)
        sources = np.empty(size, np.int16)
        is_dropped, is_image_to_text = np.empty(size, bool), np.empty(size, bool)
        captions, alternatives = np.empty(size, np.int8), np.empty(size)
        for number, mix in enumerate(self._mixes):
            for stream, places, begin in mix.deal(np.flatnonzero(labels == number), int(first[number])):
                chosen, epoch = stream.draw(begin, len(places))
                caption = self._choose_captions(chosen, self._chances(_Draw.CAPTION, stream, epoch, chosen))
                captions[places], has_caption = caption, caption >= 0
                alternatives[places] = self._chances(_Draw.ALTERNATIVE, stream, epoch, chosen)
                samples[places], epochs[places], sides[places] = chosen, epoch, stream.side_px
                sources[places], buckets[places] = stream.source, stream.buckets_px(chosen)
                to_text = self._chances(_Draw.IMAGE_TO_TEXT, stream, epoch, chosen) < self._data.image_to_text_share
                is_image_to_text[places] = to_text & has_caption
                dropped = self._chances(_Draw.CAPTION_DROP, stream, epoch, chosen) < self._data.text_drop
                is_dropped[places] = (dropped & ~to_text) | ~has_caption
        return PlannedBatch(
            step, samples, sides, buckets, sources, epochs, is_dropped, is_image_to_text, captions, alternatives
        )

    def images_by_resolution(self, step: int) -> dict[int, int]:
        """Samples of each resolution in the global batch of a step, by `side_px`."""
        size = self._data.global_batch
        counts = self._apportionment.counts_before((step + 1) * size) - self._apportionment.counts_before(step * size)
        return {mix.side_px: int(count) for mix, count in zip(self._mixes, counts, strict=True)}

    def images_by_source(self, num_steps: int) -> dict[str, int]:
        """Samples of each named source in the first `num_steps` global batches, all resolutions together."""
        counts = dict.fromkeys((source.name for source in self._data.active_sources if source.name), 0)
        for use in self.uses(num_steps):
            if use.source:
                counts[use.source] += use.num_images
        return counts

    def uses(self, num_steps: int) -> list[StreamUse]:
        """What the first `num_steps` global batches take of every source at every resolution, source by source."""
        before = self._apportionment.counts_before(num_steps * self._data.global_batch).tolist()
        counts = [mix.counts_before(count) for mix, count in zip(self._mixes, before, strict=True)]
        sizes = [{stream.source: stream.num_samples for stream in mix.streams} for mix in self._mixes]
        return [
            StreamUse(source.name, mix.side_px, size.get(number, 0), count.get(number, 0))
            for number, source in enumerate(self._data.active_sources)
            for mix, size, count in zip(self._mixes, sizes, counts, strict=True)
        ]

    def _choose_captions(self, samples: np.ndarray, chances: np.ndarray) -> np.ndarray:
        """int8 [n], one of the captions that each sample has, drawn by share; -1 if it has none."""
        shares = np.array([choice.share for choice in self._data.captions])
        statuses = [self._index.status(choice.source, samples) for choice in self._data.captions]
        sums = np.cumsum((np.stack(statuses) == CaptionStatus.USABLE) * shares[:, None], axis=0)
        chosen = (sums > chances * sums[-1]).argmax(axis=0)
        return np.where(sums[-1] > 0, chosen, -1).astype(np.int8)

    def _chances(self, draw: _Draw, stream: _Stream, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """float64 [n] in [0, 1), keyed by (seed, purpose, resolution, epoch, sample)."""
        chances = np.empty(len(samples))
        for epoch in np.unique(epochs).tolist():
            places = epochs == epoch
            chances[places] = uniform((self._seed, draw, stream.side_px, epoch), samples[places])
        return chances


class _SourceMix:
    """How the samples of one resolution are shared among the sources that have samples for it."""

    def __init__(
        self, seed: int, index: Index, resolution: Resolution, data: DataSection, selection: Selection
    ) -> None:
        sources = data.active_sources
        assert len(index.sources) == len(sources), (index.sources, sources)
        self.side_px = resolution.side_px
        every = [
            _Stream(seed, index, resolution, data, number, selection.eligible[number, resolution.side_px])
            for number in range(len(sources))
        ]
        # A source without samples leaves its share of this resolution to the others, in proportion to their shares.
        self.streams = [stream for stream in every if stream.num_samples]
        if not self.streams:
            raise DataError(
                f"data.resolutions: none of the {len(index)} images fills a bucket of resolution {resolution.side_px} "
                f"px with data.max_upscale={data.max_upscale:g} and passes data.filters; that with the longest short "
                f"side has (height, width) {_largest_px(index)}. Set the share of the resolution to 0, give it "
                "smaller buckets, add larger images, raise data.max_upscale or widen the filters."
            )
        self._apportionment = Apportionment([sources[stream.source].share for stream in self.streams])

    def deal(self, places: np.ndarray, start: int) -> Iterator[tuple[_Stream, np.ndarray, int]]:
        """Divides the places of the resolution in a batch among its streams.

        Args:
            places: int64 [n], places in the batch.
            start: how many samples of the resolution came before this batch.

        Yields:
            A stream, its part of `places`, and how many samples of the stream came before this batch.
        """
        labels = self._apportionment.labels(start, start + len(places))
        before = self._apportionment.counts_before(start).tolist()
        for number, stream in enumerate(self.streams):
            yield stream, places[labels == number], before[number]

    def counts_before(self, position: int) -> dict[int, int]:
        """Number of the source -> its samples among the first `position` samples of the resolution."""
        counts = self._apportionment.counts_before(position).tolist()
        return {stream.source: count for stream, count in zip(self.streams, counts, strict=True)}


class _Stream:
    """The endless sequence of samples of one source at one resolution."""

    def __init__(
        self,
        seed: int,
        index: Index,
        resolution: Resolution,
        data: DataSection,
        source: int,
        eligible: EligibleSamples,
    ) -> None:
        self.side_px, self.source = resolution.side_px, source
        self._seed = seed
        self._index = index
        self._max_upscale = data.max_upscale
        self._has_borders = data.active_sources[source].has_borders
        self._buckets = resolution_buckets(resolution)
        samples = index.sources[source]
        self._first, self._eligible = samples.start, eligible
        self.num_samples = len(self._eligible)
        # With one source the order is that of a run without `data.sources`.
        self._order_key = (source,) if len(index.sources) > 1 else ()

    def draw(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the index and epochs, int64 [count] each, of the samples `start` .. of the stream."""
        numbers = np.arange(start, start + count, dtype=np.int64)
        epochs, places = numbers // self.num_samples, numbers % self.num_samples
        ranks = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            is_epoch = epochs == epoch
            permutation = Permutation(
                self.num_samples, (self._seed, _Draw.ORDER, self.side_px, epoch, *self._order_key)
            )
            ranks[is_epoch] = permutation(places[is_epoch])
        return self._first + self._eligible.select(ranks), epochs

    def buckets_px(self, samples: np.ndarray) -> np.ndarray:
        """int32 [n, 2], (height, width) of the bucket of each sample."""
        return self._buckets[self._rows(samples)]

    def is_drawn(self, samples: np.ndarray) -> np.ndarray:
        """Bool [n], whether the stream ever draws each of these samples of its source."""
        return self._eligible.contains(samples - self._first)

    def _rows(self, samples: np.ndarray | slice) -> np.ndarray:
        """int16 [n], row of the bucket of each sample, or -1."""
        height_px, width_px = content_px(self._index, samples, self._has_borders).T
        return assign_buckets(height_px, width_px, self._buckets, self._max_upscale)


def _largest_px(index: Index) -> tuple[int, int]:
    """(height, width) of the image with the longest short side, the first of several."""
    largest, short = (0, 0), -1
    for part in chunks(len(index)):
        sizes = index.sizes_px(part)
        shorts = sizes.min(axis=1)
        if shorts.max() > short:
            height, width = sizes[shorts.argmax()].tolist()
            largest, short = (height, width), int(shorts.max())
    return largest


def _plan_hash(seed: int, index: Index, data: DataSection) -> str:
    """Digest of everything that decides which sample comes when, so that a loader state of another plan is refused."""
    resolutions: Sequence[object] = [
        (resolution.side_px, resolution.share, resolution.buckets_px) for resolution in data.resolutions
    ]
    captions = [
        (choice.source, choice.share, index.digests.get(caption_column(choice.source))) for choice in data.captions
    ]
    filters = [(dataclasses.astuple(rule), index.digests.get(SCORE + rule.column)) for rule in data.filters]
    borders = [source.has_borders for source in data.active_sources]
    decisive = [seed, index.hash, data.global_batch, data.max_upscale, resolutions, captions, filters, borders]
    if len(index.sources) > 1:
        names_and_shares = [(source.name, source.share) for source in data.active_sources]
        decisive += [names_and_shares, [(samples.start, samples.stop) for samples in index.sources]]
    content = json.dumps(decisive)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
