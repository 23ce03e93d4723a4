"""The plan: which samples make up which global batch, as a pure function of (seed, index, configuration, step).

Every resolution class is a stream that runs through its eligible samples epoch after epoch, each epoch in another
order. A global batch takes its exact share of every stream. Nothing is remembered from batch to batch and no rank
enters, so that a run resumes at any step, on any number of ranks, with the same batches.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import DataSection, ResolutionClass
from bitdance_scale.data.apportion import Apportionment
from bitdance_scale.data.buckets import EligibleSamples, assign_buckets, class_buckets
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index import Index
from bitdance_scale.data.permutation import Permutation, uniform
from bitdance_scale.errors import DataError


class _Draw(enum.IntEnum):
    """What a random number of the plan is for; part of its key."""

    ORDER = 1
    CAPTION_DROP = 2
    IMAGE_TO_TEXT = 3


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch of B samples, in order.

    Attributes:
        step: optimiser step it is for, from 0.
        samples: int64 [B], position in the index, which is the sample's key.
        side_px: int32 [B], name of the resolution class.
        bucket_px: int32 [B, 2], (height, width) to train at.
        epoch: int64 [B], how often the class has been through its samples.
        is_caption_dropped: bool [B], trained without caption, by chance (guidance) or because it has none.
        is_image_to_text: bool [B], trained to describe the image; never together with a dropped caption.
    """

    step: int
    samples: np.ndarray
    side_px: np.ndarray
    bucket_px: np.ndarray
    epoch: np.ndarray
    is_caption_dropped: np.ndarray
    is_image_to_text: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


class Plan:
    """Plans the global batches of a run.

    Args:
        seed: seed of the run.
        index: the data set.
        data: the data section of the configuration.

    Raises:
        DataError: no sample is large enough for one of the classes.
    """

    def __init__(self, seed: int, index: Index, data: DataSection) -> None:
        classes = [resolution for resolution in data.classes if resolution.share > 0]
        self._index = index
        self._data = data
        self._seed = seed
        self._apportionment = Apportionment([resolution.share for resolution in classes])
        self._streams = [_Stream(seed, index, resolution, data.max_upscale) for resolution in classes]
        self.hash = _plan_hash(seed, index, data)

    @property
    def num_eligible(self) -> dict[int, int]:
        """Samples that each class draws from, by its side in pixels."""
        return {stream.side_px: stream.num_samples for stream in self._streams}

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of an optimiser step, 0 <= step."""
        start, stop = step * self._data.global_batch, (step + 1) * self._data.global_batch
        labels = self._apportionment.labels(start, stop)
        first = self._apportionment.counts_before(start)
        size = len(labels)
        samples, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        sides, buckets = np.empty(size, np.int32), np.empty((size, 2), np.int32)
        is_dropped, is_image_to_text = np.empty(size, bool), np.empty(size, bool)
        for number, stream in enumerate(self._streams):
            places = np.flatnonzero(labels == number)
            chosen, epoch = stream.draw(int(first[number]), len(places))
            has_caption = self._index.caption_status[chosen] == CaptionStatus.USABLE
            samples[places], epochs[places], sides[places] = chosen, epoch, stream.side_px
            buckets[places] = stream.buckets_px(chosen)
            to_text = self._chances(_Draw.IMAGE_TO_TEXT, stream, epoch, chosen) < self._data.image_to_text_share
            is_image_to_text[places] = to_text & has_caption
            dropped = self._chances(_Draw.CAPTION_DROP, stream, epoch, chosen) < self._data.text_drop
            is_dropped[places] = (dropped & ~to_text) | ~has_caption
        return PlannedBatch(step, samples, sides, buckets, epochs, is_dropped, is_image_to_text)

    def images_by_class(self, step: int) -> dict[int, int]:
        """Samples of each resolution class in the global batch of a step, by its side in pixels."""
        size = self._data.global_batch
        counts = self._apportionment.counts_before((step + 1) * size) - self._apportionment.counts_before(step * size)
        return {stream.side_px: int(count) for stream, count in zip(self._streams, counts, strict=True)}

    def _chances(self, draw: _Draw, stream: _Stream, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """float64 [n] in [0, 1), keyed by (seed, purpose, class, epoch, sample)."""
        chances = np.empty(len(samples))
        for epoch in np.unique(epochs).tolist():
            places = epochs == epoch
            chances[places] = uniform((self._seed, draw, stream.side_px, epoch), samples[places])
        return chances


class _Stream:
    """The endless sequence of samples of one resolution class."""

    def __init__(self, seed: int, index: Index, resolution: ResolutionClass, max_upscale: float) -> None:
        self.side_px = resolution.side_px
        self._seed = seed
        self._index = index
        self._max_upscale = max_upscale
        self._buckets = class_buckets(resolution)
        self._eligible = EligibleSamples(index.height_px, index.width_px, self._buckets, max_upscale)
        self.num_samples = len(self._eligible)
        if not self.num_samples:
            largest = int(np.argmax(np.minimum(index.height_px, index.width_px)))
            raise DataError(
                f"data.classes: none of the {len(index)} images fills a bucket of class {resolution.side_px} px with "
                f"data.max_upscale={max_upscale:g}; the one with the longest short side has (height, width) "
                f"{index.size_px(largest)}. Set the share of the class to 0, give it smaller buckets, add larger "
                "images or raise data.max_upscale."
            )

    def draw(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the index and epochs, int64 [count] each, of the stream's samples from number `start` on."""
        numbers = np.arange(start, start + count, dtype=np.int64)
        epochs, places = numbers // self.num_samples, numbers % self.num_samples
        ranks = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            is_epoch = epochs == epoch
            permutation = Permutation(self.num_samples, (self._seed, _Draw.ORDER, self.side_px, epoch))
            ranks[is_epoch] = permutation(places[is_epoch])
        return self._eligible.select(ranks), epochs

    def buckets_px(self, samples: np.ndarray) -> np.ndarray:
        """int32 [n, 2], bucket of each sample."""
        heights, widths = self._index.height_px[samples], self._index.width_px[samples]
        return self._buckets[assign_buckets(heights, widths, self._buckets, self._max_upscale)]


def _plan_hash(seed: int, index: Index, data: DataSection) -> str:
    """Digest of all that decides which sample stands where: a loader state of another plan must be refused."""
    classes: Sequence[object] = [
        (resolution.side_px, resolution.share, resolution.buckets_px) for resolution in data.classes
    ]
    content = json.dumps([seed, index.hash, data.global_batch, data.max_upscale, classes])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
