"""Training from streams: the loader for tars that cannot be indexed, such as the output of commands and HTTP.

It yields what `loader.py` yields, and nothing above it differs. What holds as with an index: the shares of resolutions
and sources in every global batch, buckets, filters, captions, packs, strict decoding, and that every error is counted.
What is weaker is in `GUARANTEES`.

Every replica reads streams of its own and takes its part of each global batch, so nothing is planned for all. The
replicas agree on one thing, the number of packs: `train/step_feed.py` asks for the largest, and `filled` adds packs
without targets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.augment import Augmentation
from bitdance_scale.data.captions import SEPARATOR, CaptionStatus
from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.views import View
from bitdance_scale.data.loader import STALL_S, LoadedPack, LoadedStep, without_targets
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.packing import CostModel, partition_batch
from bitdance_scale.data.plan.permutation import uniform
from bitdance_scale.data.plan.plan import PlannedBatch
from bitdance_scale.data.prefetch import Prefetcher
from bitdance_scale.data.sample_builder import SampleBuilder
from bitdance_scale.data.storage.streams import expand_stream_sources
from bitdance_scale.data.stream_sampling import SourceStream, StreamProblem, StreamSample
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.layout import pack_samples
from bitdance_scale.sequence.pack import Sample

logger = logging.getLogger(__name__)

GUARANTEES = (
    "data.mode = 'stream': no exact epochs (samples may come more or less often than others); the order depends on the "
    "number of replicas; after a resume {resume}. Images are not checksummed. With an index (data.mode = 'indexed') "
    "none of this is so."
)
_RESUMES = {
    "restart": "the streams begin again in another order",
    "skip": "all that was trained is read again and left out",
}
# Purposes of random draws; the plan of an index has smaller numbers.
_CAPTION, _ALTERNATIVE, _CAPTION_DROP, _IMAGE_TO_TEXT = 101, 102, 103, 104
_Image = np.ndarray | SampleError


@dataclass(frozen=True)
class _StepInFlight:
    """A step whose images are being decoded.

    Attributes:
        step: the optimiser step.
        packs: samples of each pack, with where they are from and the image to come.
        num_read: samples that were read from the streams since the step before it.
        problems: what went wrong with some of them.
    """

    step: int
    packs: list[list[tuple[Sample, StreamSample, Future[_Image]]]]
    num_read: int
    problems: list[StreamProblem]

    @property
    def is_read(self) -> bool:
        """Whether all of its images are there."""
        return all(image.done() for pack in self.packs for _, _, image in pack)


class StreamLoader:
    """Yields the steps of one data-parallel rank out of streams, without end; a context manager.

    Args:
        config: the run, with `data.mode = "stream"`.
        condition: what images are drawn from.
        data_rank: this replica, 0 <= data_rank < num_data_ranks.
        num_data_ranks: data-parallel replicas.
        state: where to go on; None starts at step 0.

    Attributes:
        error_counter: errors of the samples that were drawn since it started, as with an index.
        stream_counter: errors of all samples that the streams gave, or should have, those that filters leave out
            included; an index counts them before a run. What a resume skips is counted by neither.
        state: resumes after the last step that was taken.

    Raises:
        ConfigError: the replicas cannot have equal parts of a global batch.
        DataError: a spec names no stream, or there are fewer than replicas. While stepping: streams that give nothing
            that can be trained.
        CheckpointError: `state` is of other streams or settings.
    """

    def __init__(
        self,
        config: RunConfig,
        condition: Condition,
        data_rank: int,
        num_data_ranks: int,
        state: LoaderState | None = None,
    ) -> None:
        data = config.data
        if data.global_batch % num_data_ranks:
            raise ConfigError(
                f"data.global_batch = {data.global_batch}: must be a multiple of the {num_data_ranks} data-parallel "
                "replicas with data.mode = 'stream', because each takes an equal part; change one of the two"
            )
        self.error_counter = ErrorCounter(data.max_skipped_share)
        self.stream_counter = ErrorCounter(data.max_skipped_share)
        self._config, self._condition = config, condition
        self._replica = (data_rank, num_data_ranks)
        self._resolutions = [resolution for resolution in data.resolutions if resolution.share > 0]
        self._mix = Apportionment([resolution.share for resolution in self._resolutions])
        self._source_mix = Apportionment([source.share for source in data.active_sources])
        urls = expand_stream_sources(data.active_sources)
        start = LoaderState(config.run.seed, *_hashes(config, urls), 0, 0, num_data_ranks)
        if state is not None:
            _check(state, start, data.stream_resume)
            start = dataclasses.replace(start, step=state.step)
        self.state = start
        is_skipping = data.stream_resume == "skip"
        # Streams that begin again have another order, or the same samples would always come first.
        seed = f"{config.run.seed} {0 if is_skipping else start.step}"
        sources = zip(urls, data.active_sources, strict=True)
        self._streams = [SourceStream(own, source, data, self._replica, seed) for own, source in sources]
        self._augmentation = Augmentation(data.augment, config.run.seed)
        self._next_read = 0 if is_skipping else start.step
        self._cost_model = CostModel.of_model(config.model)
        self._pool = ThreadPoolExecutor(data.read_threads, thread_name_prefix="data-reader")
        self._ahead: list[_StepInFlight] = []
        self._is_closed = False
        if data_rank == 0:
            logger.info(GUARANTEES.format(resume=_RESUMES[data.stream_resume]))
        self._steps = Prefetcher(self._start_step, start.step, data.prefetch_steps)

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def error_counters(self) -> tuple[ErrorCounter, ...]:
        """What whoever takes the steps checks over all replicas."""
        return self.error_counter, self.stream_counter

    def close(self) -> None:
        """Ends the threads and the commands that are being read."""
        self._is_closed = True
        for stream in self._streams:
            stream.stop()
        self._steps.close()
        self._pool.shutdown(cancel_futures=True)

    def next_step(self) -> LoadedStep:
        """The packs of the next step; other replicas may have another number of them (see `filled`)."""
        if self._is_closed:
            raise ValueError("the loader is closed")
        begun_s = time.monotonic()
        flight = self._steps.take()
        self._ahead.remove(flight)
        images = [[self._wait_for(source, image) for _, source, image in pack] for pack in flight.packs]
        wait_s = time.monotonic() - begun_s
        self.state = dataclasses.replace(self.state, step=flight.step + 1)
        errors = self._count_read(flight)
        packs = [self._assemble(flight.step, *planned) for planned in zip(flight.packs, images, strict=True)]
        packs[0] = dataclasses.replace(packs[0], wait_s=wait_s)
        batch = self._config.data.global_batch
        step = LoadedStep(
            step=flight.step,
            packs=packs,
            state=self.state,
            images_by_resolution=self._images_by_resolution(flight.step * batch, (flight.step + 1) * batch),
            images_by_source=self._images_by_source((flight.step + 1) * batch),
            sample_errors=sum((pack.sample_errors for pack in packs), errors),
            num_ready=sum(1 for ahead in list(self._ahead) if ahead.is_read),
            wait_s=wait_s,
        )
        multiple = self._config.parallel.packs_multiple
        return self.filled(step, len(packs) + -len(packs) % multiple)

    def filled(self, step: LoadedStep, num_packs: int) -> LoadedStep:
        """The step with so many packs: those that it lacks hold one grey image without targets."""
        packs = [*step.packs, *(self._empty_pack(step.step) for _ in range(num_packs - len(step.packs)))]
        numbered = [
            dataclasses.replace(pack, num_packs_in_step=len(packs), is_last_in_step=number == len(packs))
            for number, pack in enumerate(packs, start=1)
        ]
        return dataclasses.replace(step, packs=numbered)

    def _start_step(self, step: int) -> _StepInFlight:
        """Draws the samples of a step and starts decoding them; runs in a thread."""
        while self._next_read < step:
            # Skipped: drawn as before, so that the same ones come next, and counted when they were trained.
            self._draw(self._next_read)
            self._take_counts()
            self._next_read += 1
        drawn = self._draw(step)
        self._next_read = step + 1
        batch = self._batch(step, drawn)
        builder = SampleBuilder(self._config, _Texts(self._config, drawn), self._condition)
        samples = builder.build(batch)
        data = self._config.data
        max_pack_tokens = data.max_pack_tokens // data.pack_multiple * data.pack_multiple
        (places_of_packs,) = partition_batch(
            builder.lengths(samples), 1, max_pack_tokens, self._cost_model, pad_multiple=data.pack_multiple
        )
        packs = [
            [(samples[place], drawn[place].sample, self._submit(drawn[place], step)) for place in places]
            for places in places_of_packs
        ]
        flight = _StepInFlight(step, packs, *self._take_counts())
        self._ahead.append(flight)
        return flight

    def _take_counts(self) -> tuple[int, list[StreamProblem]]:
        """Samples read from all streams since the last call, and what went wrong with some of them."""
        counts = [stream.take_counts() for stream in self._streams]
        return sum(num_read for num_read, _ in counts), [problem for _, problems in counts for problem in problems]

    def _submit(self, drawn: _Drawn, step: int) -> Future[_Image]:
        # Streams have no epochs.
        view = self._augmentation.view(step, drawn.sample.key)
        return self._pool.submit(_decode, drawn.sample, drawn.px, self._config.data.resize, view)

    def _draw(self, step: int) -> list[_Drawn]:
        """The samples of this replica in a step: every R-th place of the global batch."""
        number, count = self._replica
        size = self._config.data.global_batch
        labels = self._mix.labels(step * size, (step + 1) * size)
        before = self._mix.counts_before(step * size)
        drawn = []
        for place in range(size):
            label = int(labels[place])
            position = int(before[label])
            before[label] += 1
            if place % count != number:
                continue
            source = int(self._source_mix.labels(position, position + 1)[0])
            sample, bucket_px = self._streams[source].draw(self._resolutions[label])
            drawn.append(_Drawn(sample, source, self._resolutions[label].side_px, bucket_px))
        return drawn

    def _batch(self, step: int, drawn: Sequence[_Drawn]) -> PlannedBatch:
        """What is drawn by chance for these samples: captions, which of them are dropped, and the task."""
        data, size = self._config.data, len(drawn)
        keys = np.array([item.sample.key for item in drawn], np.int64)
        sides = np.array([item.side_px for item in drawn], np.int32)
        chances = {purpose: np.empty(size) for purpose in (_CAPTION, _ALTERNATIVE, _CAPTION_DROP, _IMAGE_TO_TEXT)}
        for side_px in np.unique(sides).tolist():
            places = sides == side_px
            for purpose, values in chances.items():
                values[places] = uniform((self._config.run.seed, purpose, side_px, step), keys[places])
        shares = np.array([choice.share for choice in data.captions])
        usable = np.array([[found[1] is CaptionStatus.USABLE for found in item.sample.captions] for item in drawn])
        sums = np.cumsum(usable * shares, axis=1)
        captions = np.where(sums[:, -1] > 0, (sums > (chances[_CAPTION] * sums[:, -1])[:, None]).argmax(axis=1), -1)
        to_text = chances[_IMAGE_TO_TEXT] < data.image_to_text_share
        dropped = chances[_CAPTION_DROP] < data.text_drop
        return PlannedBatch(
            step=step,
            samples=keys,
            side_px=sides,
            bucket_px=np.array([item.px for item in drawn], np.int32),
            source=np.array([item.source for item in drawn], np.int16),
            epoch=np.zeros(size, np.int64),
            is_caption_dropped=(dropped & ~to_text) | (captions < 0),
            is_image_to_text=to_text & (captions >= 0),
            caption=captions.astype(np.int8),
            alternative=chances[_ALTERNATIVE],
        )

    def _wait_for(self, source: StreamSample, image: Future[_Image]) -> _Image:
        while True:
            try:
                return image.result(STALL_S)
            except TimeoutError:
                logger.warning("decoding sample %s of %s takes longer than %.0f s", source.name, source.shard, STALL_S)

    def _count_read(self, flight: _StepInFlight) -> Counter[ErrorCause]:
        """Counts what was read from the streams for a step; returns what went wrong, by cause."""
        errors: Counter[ErrorCause] = Counter()
        self.stream_counter.record_read(flight.num_read)
        for problem in flight.problems:
            for _ in range(problem.num_samples):
                self.stream_counter.record_skipped(problem.error, problem.shard, problem.name)
            errors[problem.error.cause] += problem.num_samples
        return errors

    def _assemble(
        self, step: int, planned: Sequence[tuple[Sample, StreamSample, Future[_Image]]], results: Sequence[_Image]
    ) -> LoadedPack:
        """Lays out the samples whose image could be decoded, and counts the others."""
        errors: Counter[ErrorCause] = Counter()
        kept, images = [], []
        for (sample, source, _), result in zip(planned, results, strict=True):
            self.error_counter.record_read()
            statuses = [status for _, status in source.captions]
            caption_error = None if CaptionStatus.USABLE in statuses else statuses[0].error
            if caption_error is not None:
                self.error_counter.record_caption(caption_error, source.shard)
                errors[caption_error] += 1
            if isinstance(result, SampleError):
                self.error_counter.record_skipped(result, source.shard, source.name)
                errors[result.cause] += 1
            else:
                kept.append(sample)
                images.append(result)
        loaded = self._pack(step, kept, images) if kept else self._empty_pack(step)
        return dataclasses.replace(loaded, sample_errors=errors)

    def _pack(self, step: int, samples: list[Sample], images: list[np.ndarray]) -> LoadedPack:
        pack = pack_samples(samples, self._condition.image_tokens, self._config.data.pack_multiple)
        return LoadedPack(pack, images, self.state, step, 0, False, Counter(), 0.0)

    def _empty_pack(self, step: int) -> LoadedPack:
        buckets = (bucket for resolution in self._resolutions for bucket in resolution.buckets_px)
        height, width = min(buckets, key=lambda bucket: bucket[0] * bucket[1])
        cell_px = self._config.vision.downsample
        sample = self._condition.drawing_sample(0, "", (height // cell_px, width // cell_px), is_caption_dropped=True)
        return self._pack(step, [without_targets(sample)], [np.full((height, width, 3), 128, np.uint8)])

    def _images_by_resolution(self, start: int, stop: int) -> dict[int, int]:
        counts = self._mix.counts_before(stop) - self._mix.counts_before(start)
        return {r.side_px: int(count) for r, count in zip(self._resolutions, counts, strict=True)}

    def _images_by_source(self, stop: int) -> dict[str, int]:
        counts = sum(self._source_mix.counts_before(int(count)) for count in self._mix.counts_before(stop))
        names = [source.name for source in self._config.data.active_sources]
        return {name: int(count) for name, count in zip(names, np.atleast_1d(counts), strict=True) if name}


@dataclass(frozen=True)
class _Drawn:
    """A sample of a step: its source, the side of its resolution and (height, width) of its bucket, in pixels."""

    sample: StreamSample
    source: int
    side_px: int
    px: tuple[int, int]


class _Texts:
    """The captions of the samples of one step (`sample_builder.CaptionTexts`)."""

    def __init__(self, config: RunConfig, drawn: Sequence[_Drawn]) -> None:
        self._places = {choice.source: place for place, choice in enumerate(config.data.captions)}
        self._samples = {item.sample.key: item.sample for item in drawn}

    def texts(self, source: str, samples: np.ndarray) -> list[list[str]]:
        """All alternatives of a caption of each sample, by its key."""
        place = self._places[source]
        return [self._samples[key].captions[place][0].decode("utf-8").split(SEPARATOR) for key in samples.tolist()]


def _decode(sample: StreamSample, bucket_px: tuple[int, int], resize: str, view: View) -> _Image:
    """The pixels of a sample, or why there are none; runs in the pool."""
    try:
        return decode_image(sample.image, sample.size_px, bucket_px, resize=resize, view=view)
    except SampleError as error:
        return error


def _hashes(config: RunConfig, urls: Sequence[Sequence[str]]) -> tuple[str, str]:
    """What stands for the hashes of an index and a plan: of the streams by name, and of the settings of the mix."""
    data = config.data
    settings = [
        data.global_batch,
        data.max_upscale,
        [dataclasses.astuple(resolution) for resolution in data.resolutions],
        [dataclasses.astuple(choice) for choice in data.captions],
        [dataclasses.astuple(rule) for rule in data.filters],
        [(source.name, source.share) for source in data.active_sources],
    ]
    names, rest = (hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for value in (urls, settings))
    return f"stream-{names}", f"stream-{rest}"


def _check(state: LoaderState, start: LoaderState, on_resume: str) -> None:
    state.check(start)
    if on_resume == "skip" and state.num_data_ranks != start.num_data_ranks:
        raise CheckpointError(
            f"data.stream_resume = 'skip': the checkpoint was trained on {state.num_data_ranks} data-parallel "
            f"replicas, this run has {start.num_data_ranks}, and each would draw other samples. Use "
            f"{state.num_data_ranks}, or set data.stream_resume = 'restart'"
        )
