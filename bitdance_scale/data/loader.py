"""The loader of one replica: runs plan, packing, reading and decoding ahead of training, and yields packs in order.

One thread plans steps ahead and hands the samples of this rank to a pool of threads, which read and decode (Pillow
releases the interpreter lock while it works). The consumer's thread puts packs together, so that everything it counts,
and every order, is the same however the threads were timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.augment import Augmentation
from bitdance_scale.data.bit_shards import BitStore, recipe
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.views import View
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.plan.buckets import content_px
from bitdance_scale.data.plan.packing import CostModel, partition_batch
from bitdance_scale.data.plan.plan import Plan, PlannedBatch
from bitdance_scale.data.prefetch import Prefetcher
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.data.sample_builder import SampleBuilder
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import CheckpointError
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.layout import pack_samples
from bitdance_scale.sequence.pack import Pack, Sample
from bitdance_scale.vision.codes import code_bytes

logger = logging.getLogger(__name__)

STALL_S = 30.0
"""An image that is waited for longer is named in a warning, repeatedly."""

_Image = np.ndarray | SampleError
"""Pixels uint8 [height, width, 3], or vision tokens uint8 [h * w, C / 8], or why there are none."""


@dataclass(frozen=True)
class LoadedPack:
    """One micro-batch of this replica.

    Attributes:
        pack: the laid-out samples; `vision_bits` is None until the images are encoded.
        images: uint8 [height, width, 3] of every sample of the pack, in its order; none where the pack has its bits.
        state: resumes after this pack.
        step: optimiser step it belongs to.
        num_packs_in_step: packs of the step, the same on all replicas.
        is_last_in_step: whether the step is complete with it.
        sample_errors: cause -> planned samples with it; those with a cause that `is_skipped` are left out.
        wait_s: seconds the consumer waited for it.
    """

    pack: Pack
    images: list[np.ndarray]
    state: LoaderState
    step: int
    num_packs_in_step: int
    is_last_in_step: bool
    sample_errors: Counter[ErrorCause]
    wait_s: float

    @property
    def num_skipped(self) -> int:
        """Planned samples that could not be used and are left out."""
        return sum(count for cause, count in self.sample_errors.items() if cause.is_skipped)


@dataclass(frozen=True)
class LoadedStep:
    """All micro-batches of one optimiser step on this replica: what a step is from the loader to the device.

    The loader gives it to one rank of the replica with images, `parallel/broadcast.py` to all of them with bits.

    Attributes:
        step: the optimiser step.
        packs: its packs, in order; after a resume inside the step, those that remain.
        state: resumes after the step.
        images_by_resolution: planned samples of the *global* batch, by side of the resolution in pixels.
        images_by_source: planned samples of the global batches of the run up to this one, by name of the source.
        sample_errors: cause -> samples of this replica with it; of streams also those that could not be planned.
        num_ready: steps read ahead of this one, all of their images included, when it was taken.
        wait_s: seconds the consumer waited for the packs.
    """

    step: int
    packs: list[LoadedPack]
    state: LoaderState
    images_by_resolution: dict[int, int]
    images_by_source: dict[str, int]
    sample_errors: Counter[ErrorCause]
    num_ready: int
    wait_s: float

    @property
    def num_skipped(self) -> int:
        """Planned samples of this replica that could not be used and are left out."""
        return sum(pack.num_skipped for pack in self.packs)


@dataclass(frozen=True)
class _StepInFlight:
    """A step whose images are being read: its packs on this rank, each a list of samples with the images to come."""

    step: int
    packs: list[list[tuple[Sample, Future[_Image]]]]

    @property
    def is_read(self) -> bool:
        """Whether all of its images are there."""
        return all(image.done() for pack in self.packs for _, image in pack)


class Loader:
    """Iterates over the packs of one data-parallel rank, without end; a context manager.

    Args:
        config: the run.
        condition: what images are drawn from.
        index: the data set, divided into `data.active_sources`.
        data_rank: this replica, 0 <= data_rank < num_data_ranks.
        num_data_ranks: data-parallel replicas.
        state: where to go on; None starts at step 0.

    Attributes:
        plan: the plan it follows.
        error_counter: sample errors met since it started.

    Raises:
        CheckpointError: `state` is of another data set, seed or plan.
        DataError: a resolution or a source has no samples; a store cannot be made ready.
        ConfigError: the shards do not fit the node's cache; while iterating, a batch that does not fit the packs (see
            `packing.partition_batch`).
    """

    def __init__(
        self,
        config: RunConfig,
        condition: Condition,
        index: Index,
        data_rank: int,
        num_data_ranks: int,
        state: LoaderState | None = None,
    ) -> None:
        assert 0 <= data_rank < num_data_ranks, (data_rank, num_data_ranks)
        self.plan = Plan(config.run.seed, index, config.data)
        self.error_counter = ErrorCounter(config.data.max_skipped_share)
        start = LoaderState(config.run.seed, index.hash, self.plan.hash, 0, 0, num_data_ranks)
        if state is not None:
            state.check(start)
            start = dataclasses.replace(start, step=state.step, pack=state.pack)
        self.state = start
        self._start = start
        self._config = config
        self._condition = condition
        self._index = index
        self._data_rank = data_rank
        self._num_data_ranks = num_data_ranks
        self._builder = SampleBuilder(config, index, condition)
        self._augmentation = Augmentation(config.data.augment, config.run.seed)
        self._cost_model = CostModel.of_model(config.model)
        stores = Stores(config.data.s3)
        self._reader = ShardReader(stores)
        self._bits: BitStore | None = None
        if config.data.bits_dir:
            self._bits = BitStore(config.data.bits_dir, index, recipe(config.data, config.vision))
        else:
            stores.prepare((entry.path, entry.num_bytes) for entry in index.shards)
        self._pool = ThreadPoolExecutor(config.data.read_threads, thread_name_prefix="data-reader")
        self._current: _StepInFlight | None = None
        self._ahead: deque[_StepInFlight] = deque()
        self._is_closed = False
        self._steps = Prefetcher(self._start_step, start.step, config.data.prefetch_steps)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def error_counters(self) -> tuple[ErrorCounter, ...]:
        """What whoever takes the steps checks over all replicas."""
        return (self.error_counter,)

    def close(self) -> None:
        """Ends the threads; reads that were not begun are dropped."""
        self._is_closed = True
        self._steps.close()
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()
        if self._bits is not None:
            self._bits.close()

    def __iter__(self) -> Iterator[LoadedPack]:
        return self

    def __next__(self) -> LoadedPack:
        if self._is_closed:
            raise ValueError("the loader is closed")
        begun_s = time.monotonic()
        if self._current is None:
            self._current = self._steps.take()
            self._ahead.popleft()
        flight = self._current
        if self.state.pack >= len(flight.packs):
            raise CheckpointError(
                f"the loader state lies after pack {self.state.pack} of step {self.state.step}, which now has "
                f"{len(flight.packs)} packs: data.max_pack_tokens or the text tokenizer changed. Restore them, or "
                "resume from a checkpoint at a step boundary."
            )
        planned = flight.packs[self.state.pack]
        results = [self._wait_for(sample, image) for sample, image in planned]
        wait_s = time.monotonic() - begun_s
        pack, images, sample_errors = self._assemble([sample for sample, _ in planned], results)
        is_last = self.state.pack + 1 == len(flight.packs)
        step, number = (flight.step + 1, 0) if is_last else (flight.step, self.state.pack + 1)
        self.state = dataclasses.replace(self.state, step=step, pack=number)
        if is_last:
            self._current = None
        return LoadedPack(pack, images, self.state, flight.step, len(flight.packs), is_last, sample_errors, wait_s)

    def next_step(self) -> LoadedStep:
        """All packs of the next step (of the current one those that remain)."""
        packs = [next(self)]
        while not packs[-1].is_last_in_step:
            packs.append(next(self))
        return LoadedStep(
            step=packs[-1].step,
            packs=packs,
            state=packs[-1].state,
            images_by_resolution=self.plan.images_by_resolution(packs[-1].step),
            images_by_source=self.plan.images_by_source(packs[-1].step + 1),
            sample_errors=sum((pack.sample_errors for pack in packs), Counter()),
            num_ready=self._num_ready(),
            wait_s=sum(pack.wait_s for pack in packs),
        )

    def _start_step(self, step: int) -> _StepInFlight:
        """Plans a step and starts reading this rank's images; runs in the planning thread."""
        data = self._config.data
        batch = self.plan.batch(step)
        samples = self._builder.build(batch)
        # A pack is padded to a multiple, so room beyond the last whole multiple cannot be used.
        max_pack_tokens = data.max_pack_tokens // data.pack_multiple * data.pack_multiple
        ranks = partition_batch(
            self._builder.lengths(samples),
            self._num_data_ranks,
            max_pack_tokens,
            self._cost_model,
            self._config.parallel.packs_multiple,
            data.pack_multiple,
        )
        num_done = self._start.pack if step == self._start.step else 0
        packs: list[list[tuple[Sample, Future[_Image]]]] = []
        for number, places in enumerate(ranks[self._data_rank]):
            remaining = places if number >= num_done else []
            packs.append([(samples[place], self._submit(batch, place)) for place in remaining])
        flight = _StepInFlight(step, packs)
        self._ahead.append(flight)
        return flight

    def _num_ready(self) -> int:
        """Steps ahead of those taken, from the next one on, that are read completely."""
        ready = itertools.takewhile(lambda flight: flight.is_read, list(self._ahead))
        return sum(1 for _ in ready)

    def _wait_for(self, sample: Sample, image: Future[_Image]) -> _Image:
        """The image once it is read; a long wait is logged with what is waited for."""
        begun_s = time.monotonic()
        while True:
            try:
                return image.result(STALL_S)
            except TimeoutError:
                index, key = self._index, sample.key
                logger.warning(
                    "waiting for %s: sample %s, %d bytes from byte %d on, for %.0f s now",
                    index.shard_path(key),
                    index.name(key),
                    index.place(key).num_bytes,
                    index.place(key).offset,
                    time.monotonic() - begun_s,
                )

    def _submit(self, batch: PlannedBatch, place: int) -> Future[_Image]:
        sample, epoch, augmentation = int(batch.samples[place]), int(batch.epoch[place]), self._augmentation
        if self._bits is not None:
            side_px, number = int(batch.side_px[place]), augmentation.stored_view(epoch, sample)
            return self._pool.submit(self._read_bits, self._bits, sample, side_px, number)
        height, width = batch.bucket_px[place].tolist()
        has_borders = self._config.data.active_sources[batch.source[place]].has_borders
        view = augmentation.view(epoch, sample)
        return self._pool.submit(self._read_image, sample, (height, width), has_borders, view)

    def _read_image(self, sample: int, bucket_px: tuple[int, int], has_borders: bool, view: View) -> _Image:
        """The pixels of a sample, or why there are none; runs in the pool."""
        index = self._index
        try:
            data = self._reader.image(index, sample)
            height_px, width_px = content_px(index, slice(sample, sample + 1), has_borders)[0].tolist()
            content = height_px, width_px
            return decode_image(data, index.size_px(sample), bucket_px, content, self._config.data.resize, view)
        except SampleError as error:
            return error

    @staticmethod
    def _read_bits(store: BitStore, sample: int, side_px: int, view: int) -> _Image:
        """The vision tokens of a sample, or why there are none; runs in the pool."""
        try:
            return store.read(sample, side_px, view)
        except SampleError as error:
            return error

    def _assemble(
        self, samples: list[Sample], results: list[_Image]
    ) -> tuple[Pack, list[np.ndarray], Counter[ErrorCause]]:
        """Lays out the samples whose image is there, and counts the others."""
        sample_errors: Counter[ErrorCause] = Counter()
        kept: list[Sample] = []
        images: list[np.ndarray] = []
        for sample, result in zip(samples, results, strict=True):
            shard = self._index.shard_path(sample.key)
            self.error_counter.record_read()
            caption_error = self._caption_error(sample.key)
            if caption_error is not None:
                self.error_counter.record_caption(caption_error, shard)
                sample_errors[caption_error] += 1
            if isinstance(result, SampleError):
                self.error_counter.record_skipped(result, shard, self._index.name(sample.key))
                sample_errors[result.cause] += 1
            else:
                kept.append(sample)
                images.append(result)
        if not kept:
            # Every rank must run every pack of the step, so an empty one cannot be skipped.
            kept, images = [without_targets(samples[0])], [self._nothing(samples[0])]
        pack = pack_samples(kept, self._condition.image_tokens, self._config.data.pack_multiple)
        if self._bits is not None:
            return pack.with_bits(np.concatenate(images)), [], sample_errors
        return pack, images, sample_errors

    def _caption_error(self, key: int) -> ErrorCause | None:
        """Why the sample has no caption at all, by the first place to look for one; None where it has one."""
        one = slice(key, key + 1)
        statuses = [CaptionStatus(self._index.status(c.source, one)[0]) for c in self._config.data.captions]
        return None if CaptionStatus.USABLE in statuses else statuses[0].error

    def _nothing(self, sample: Sample) -> np.ndarray:
        """A grey image, or bits of -1 or latents of 0, of a sample's size."""
        vision = self._config.vision
        height, width = sample.grid
        if self._bits is not None:
            return np.zeros((height * width, code_bytes(vision.num_bits, vision.latents)), dtype=np.uint8)
        cell_px = vision.downsample
        return np.full((height * cell_px, width * cell_px, 3), 128, dtype=np.uint8)


def without_targets(sample: Sample) -> Sample:
    """The sample as context only: it adds to no loss."""
    return dataclasses.replace(
        sample,
        first_target_before=len(sample.before_ids),
        first_target_after=len(sample.after_ids),
        predicts_image=False,
    )
