"""Crops of images without captions, to train and evaluate the visual tokenizer.

Which images a step has and how they are cropped depends on (seed, step) and on which images can be read, not on the
number of ranks or on what was read before. In the place of an image that cannot be read comes another one, drawn by
(seed, step, place), so that every rank has its whole part of every step: a rank with one image a step would have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from bitdance_scale.data.data_errors import ErrorCounter, SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.permutation import Permutation
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.errors import DataError

NUM_STEPS_AHEAD = 2
MAX_SUBSTITUTES = 64
"""Images that are tried in the place of one that cannot be read. If half of all images are bad, none of so many can be
read in one of 4e19 places."""


@dataclass(frozen=True)
class _Cut:
    """What came of one place of a step.

    Attributes:
        sample: position in the index of the image that was tried last.
        crop: uint8 [height, width, 3] of it; None if it cannot be read either.
        failures: (position in the index, what is wrong) of all that cannot be read.
    """

    sample: int
    crop: np.ndarray | None
    failures: list[tuple[int, SampleError]]


class CropStream:
    """Batches of random crops, with one crop size per step; yields the part of this rank.

    Every size goes through the images that are large enough for it, epoch after epoch, each in another order. Threads
    read up to `NUM_STEPS_AHEAD` steps ahead. Use as a context manager.

    Args:
        index: the data set.
        sizes_px: (height, width) of the crops; each step draws one of them, all equally likely.
        images_px: pixels per step over all ranks.
        max_zoom: crops are cut from images scaled to 1..max_zoom times the covering size, never enlarged.
        seed: seed of the order and the crops.
        rank: this rank, 0 <= rank < num_ranks.
        num_ranks: ranks that share each step.
        num_steps: length of the stream.
        num_threads: threads that read and decode.
        max_skipped_share: share of unreadable images that `error_counter` allows.
        first_step: step that the stream begins with.

    Attributes:
        samples: positions in the index of the images that were yielded last.
        slots: their numbers within the step, over all ranks.
        error_counter: images that could not be read since it started; whoever takes the steps checks them over all
            ranks.

    Raises:
        DataError: no image is large enough for one of the sizes.
    """

    def __init__(
        self,
        index: Index,
        *,
        sizes_px: Sequence[tuple[int, int]],
        images_px: int,
        max_zoom: float,
        seed: int,
        rank: int,
        num_ranks: int,
        num_steps: int,
        num_threads: int,
        max_skipped_share: float,
        first_step: int = 0,
    ) -> None:
        self._index = index
        self._sizes_px = tuple(sizes_px)
        self._eligible = [large_enough(index, size) for size in self._sizes_px]
        self._max_zoom = max_zoom
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks
        self._size_of_step = np.random.default_rng([seed, 0]).integers(len(self._sizes_px), size=num_steps)
        self._images_of_size = [images_px // (height * width) for height, width in self._sizes_px]
        self._reader = ShardReader()
        self._first_step = first_step
        self.samples: tuple[int, ...] = ()
        self.slots: tuple[int, ...] = ()
        self.error_counter = ErrorCounter(max_skipped_share)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="crops")

    def __enter__(self) -> CropStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, 3] per step.

        Raises:
            DataError: neither an image nor any of `MAX_SUBSTITUTES` others in its place can be read.
        """
        ahead: list[list[Future[_Cut]]] = []
        for step in range(self._first_step, len(self._size_of_step)):
            stop = min(step + NUM_STEPS_AHEAD + 1, len(self._size_of_step))
            ahead += [self._start(later) for later in range(step + len(ahead), stop)]
            yield self._collect(ahead.pop(0))

    def _start(self, step: int) -> list[Future[_Cut]]:
        """Hands the images of a step to the threads."""
        size = int(self._size_of_step[step])
        num_images = self._images_of_size[size]
        first = int((self._size_of_step[:step] == size).sum()) * num_images
        tasks = []
        for slot in range(self._rank, num_images, self._num_ranks):
            epoch, position = divmod(first + slot, len(self._eligible[size]))
            order = Permutation(len(self._eligible[size]), (self._seed, size, epoch))
            sample = int(self._eligible[size][order(np.array([position]))[0]])
            tasks.append(self._threads.submit(self._cut, size, step, slot, sample))
        return tasks

    def _cut(self, size: int, step: int, slot: int, sample: int) -> _Cut:
        """The crop of an image, or of another one in its place; runs in the threads."""
        rng = np.random.default_rng([self._seed, 1, step, slot])
        failures: list[tuple[int, SampleError]] = []
        while True:
            try:
                return _Cut(sample, self._crop(sample, self._sizes_px[size], rng), failures)
            except SampleError as error:
                failures.append((sample, error))
            if len(failures) > MAX_SUBSTITUTES:
                return _Cut(sample, None, failures)
            rng = np.random.default_rng([self._seed, 2, step, slot, len(failures)])
            sample = int(rng.choice(self._eligible[size]))

    def _crop(self, sample: int, crop_px: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        stored = self._index.size_px(sample)
        room = min(side / crop for side, crop in zip(stored, crop_px, strict=True))
        zoom = rng.uniform(1.0, max(1.0, min(self._max_zoom, room)))
        height, width = (max(crop, int(crop * zoom)) for crop in crop_px)
        scaled = height, width
        image = decode_image(self._reader.image(self._index, sample), stored, scaled)
        top, left = (int(rng.integers(side - crop + 1)) for side, crop in zip(scaled, crop_px, strict=True))
        return image[top : top + crop_px[0], left : left + crop_px[1]]

    def _collect(self, tasks: Sequence[Future[_Cut]]) -> np.ndarray:
        counter, cuts = self.error_counter, [task.result() for task in tasks]
        for cut in cuts:
            counter.record_read(len(cut.failures) + (cut.crop is not None))
            for sample, error in cut.failures:
                counter.record_skipped(error, self._index.shard_path(sample), self._index.name(sample))
        crops = [cut.crop for cut in cuts if cut.crop is not None]
        if len(crops) < len(cuts):
            raise DataError(
                f"an image cannot be read, nor can {MAX_SUBSTITUTES} others in its place: {counter.summary()}. Repair "
                "or remove these shards."
            )
        self.samples = tuple(cut.sample for cut in cuts)
        self.slots = tuple(range(self._rank, self._rank + len(cuts) * self._num_ranks, self._num_ranks))
        return np.stack(crops)


def large_enough(index: Index, crop_px: tuple[int, int]) -> np.ndarray:
    """int64 [n], the samples that cover `crop_px` (height, width) without being enlarged.

    Raises:
        DataError: no sample is large enough.
    """
    samples = np.flatnonzero((index.sizes_px(slice(None)) >= crop_px).all(axis=1))
    if not len(samples):
        raise DataError(
            f"{index.shards[0].path} (first of {len(index.shards)} shards): none of {len(index)} images covers a crop "
            f"of {crop_px[0]} x {crop_px[1]} px. Remove this size or add larger images."
        )
    return samples
