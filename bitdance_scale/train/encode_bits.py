"""Turns image shards into bit shards, shared out over the ranks of a job; what is there already stays."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.augment import num_stored_views, stored_views
from bitdance_scale.data.bit_shards import (
    NOT_ENCODED,
    Bits,
    read_tables,
    recipe,
    recipe_sides_px,
    recipe_views,
    shard_file,
    shard_meta,
    stored_filters,
    write_bit_shard,
    write_table,
)
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import decode_views
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.buckets import content_px
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError, UnreadableError
from bitdance_scale.parallel.agreement import all_ranks, any_rank, from_all_ranks
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.shared_index import training_index
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.wording import first_few

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE = 64
_MAX_FAILURES = 10
_WAIT_S = 14 * 24 * 3600.0


class Encoder:
    """Encodes the shards of a data set, one at a time.

    Args:
        config: the run that is to train on the bits.
        index: its data set.
        vision: the tokenizer.
        folder: where bit shards go.
        num_verified: samples of each shard that are read back and encoded once more, alone.
    """

    def __init__(
        self, config: RunConfig, index: Index, vision: VisionTokenizer, folder: Path, num_verified: int
    ) -> None:
        self._config, self._index, self._vision, self._folder = config, index, vision, folder
        self._num_verified = num_verified
        self._plan = Plan(config.run.seed, index, config.data)
        self._reader = ShardReader(Stores(config.data.s3))
        self.recipe = recipe(config.data, config.vision)

    def is_done(self, row: int) -> bool:
        """Whether the bit shard of a row of the shard table is there: whole, of these images, with all that is drawn.

        Raises:
            UnreadableError: what is there cannot be read now.
        """
        path = self._folder / shard_file(row)
        if not path.exists():
            return False
        try:
            found, tables = read_tables(path)
            return found == shard_meta(self._index, row, self.recipe) and not self._lacks(row, tables)
        except UnreadableError:
            raise
        except DataError as error:
            logger.warning("%s It is made again.", error)
            return False

    def encode(self, row: int) -> None:
        """Makes the bit shard of a row of the shard table.

        Raises:
            DataError: an image cannot be read for now, or the bits written are not those that encoding gives again;
                then there is no bit shard.
        """
        path, meta = self._folder / shard_file(row), shard_meta(self._index, row, self.recipe)
        samples = self._index.shard_samples(row)
        resolutions = {side_px: list(self._encoded(samples, side_px)) for side_px in recipe_sides_px(self.recipe)}
        write_bit_shard(path, meta, resolutions)
        try:
            self._verify(path, samples, row)
        except DataError:
            # It would count as done.
            path.unlink(missing_ok=True)
            raise

    def _lacks(self, row: int, tables: Mapping[int, np.ndarray]) -> bool:
        """Whether a bit shard lacks samples that are drawn now: other filters left them out when it was made."""
        samples, num_views = self._index.shard_samples(row), recipe_views(self.recipe)
        numbers = np.arange(samples.start, samples.stop)
        return any(
            np.any(self._plan.buckets_px(numbers[table["error_code"][::num_views] == NOT_ENCODED], side_px))
            for side_px, table in tables.items()
        )

    def _encoded(self, samples: range, side_px: int) -> Iterator[Bits]:
        """The bits of a shard's samples in a class, in order, every view of each."""
        buckets = self._plan.buckets_px(np.arange(samples.start, samples.stop), side_px)
        tasks = list(zip(samples, map(tuple, buckets.tolist()), strict=True))
        num_views = num_stored_views(self._config.data.augment)
        at_once = max(1, IMAGES_AT_ONCE // num_views)
        with ThreadPoolExecutor(self._config.data.read_threads) as pool:
            for start in range(0, len(tasks), at_once):
                part = tasks[start : start + at_once]
                found = list(pool.map(lambda task: self._images(*task), part))
                images = [image for views in found if isinstance(views, list) for image in views]
                bits = iter(self._vision.encode([torch.tensor(image) for image in images]))
                for (sample, _), views in zip(part, found, strict=True):
                    if isinstance(views, SampleError):
                        self._check_lasting(sample, views)
                        yield from [views.cause] * num_views
                    else:
                        yield from [None] * num_views if views is None else (next(bits).tobytes() for _ in views)

    def _check_lasting(self, sample: int, error: SampleError) -> None:
        """A bad image stays bad, and is stored as such; a failed read may succeed tomorrow, and is none."""
        if error.cause in (ErrorCause.READ_FAILED, ErrorCause.SHARD_CHANGED):
            raise DataError(
                f"{self._index.shard_path(sample)}: sample {self._index.name(sample)}: {error}. Restore the shard and "
                "run again: what is encoded stays."
            ) from error

    def _images(self, sample: int, bucket_px: tuple[int, int]) -> list[np.ndarray] | SampleError | None:
        """The views of a sample, why there are none, or None if the resolution does not draw it."""
        if not bucket_px[0]:
            return None
        index, section = self._index, self._config.data
        has_borders = section.active_sources[self._plan.source_of(sample)].has_borders
        height, width = content_px(index, slice(sample, sample + 1), has_borders)[0].tolist()
        try:
            data, views = self._reader.image(index, sample), stored_views(section.augment, sample)
            return decode_views(data, index.size_px(sample), bucket_px, (height, width), section.resize, views)
        except SampleError as error:
            return error

    def _verify(self, path: Path, samples: range, row: int) -> None:
        """Reads some bits back, and encodes their images once more."""
        _, tables = read_tables(path)
        chosen = np.random.default_rng([self._config.run.seed, row]).permutation(len(samples))[: self._num_verified]
        content = path.read_bytes()
        for side_px, table in tables.items():
            buckets = self._plan.buckets_px(samples.start + chosen, side_px)
            for place, bucket in zip(chosen.tolist(), buckets.tolist(), strict=True):
                views = self._images(samples.start + place, tuple(bucket))
                if not isinstance(views, list):
                    continue
                for view, image in enumerate(views):
                    number = place * len(views) + view
                    start = int(table["start"][number])
                    found = content[start : start + int(table["num_bytes"][number])]
                    if not self._vision.is_of(found, torch.tensor(image)):
                        name = self._index.name(samples.start + place)
                        raise DataError(
                            f"{path}: sample {name} at {side_px} px: encoding it alone gives other bits than together "
                            "with others, by more than rounding, or the file was damaged. It was removed: run again; "
                            "if that comes back, the device does not compute reproducibly: encode on another."
                        )


def encode_rows(encoder: Encoder, rows: Sequence[int], rank: int, stop: StopRequest) -> list[str]:
    """Makes the bit shards of some rows; returns why some could not be made.

    One that fails leaves the others to be made, unless so many do that the reason is none of theirs.

    Args:
        encoder: makes one.
        rows: of the shard table.
        rank: of this process, for the log.
        stop: whether to leave the rest.
    """
    failures: list[str] = []
    for number, row in enumerate(rows, start=1):
        if stop.is_requested or len(failures) == _MAX_FAILURES:
            break
        try:
            encoder.encode(row)
        except DataError as error:
            # Said now: the others may take days.
            logger.error("rank %d: %d of %d shards, failed: %s", rank, number, len(rows), error)
            failures.append(str(error))
        else:
            logger.info("rank %d: %d of %d shards, encoded", rank, number, len(rows))
    return failures


def _missing(encoder: Encoder, num_rows: int, topology: Topology) -> list[int]:
    """The rows that have no bit shard yet, on all ranks; a collective."""
    with all_ranks():
        mine = [row for row in range(topology.rank, num_rows, topology.world_size) if not encoder.is_done(row)]
    return sorted(row for rows in from_all_ranks(mine) for row in rows)


def run_encode(config: RunConfig, folder: Path, num_verified: int) -> int:
    """Encodes the images of a configuration into bit shards; the ranks of this job share out the shards.

    Args:
        config: the run that is to train on them.
        folder: where they go; the run's `data.bits_dir`. What is there already stays.
        num_verified: samples of each shard that are read back and encoded once more.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    # There is no run folder for a log file.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    # No bits are wanted where they are made.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, bits_dir=""))
    # Ranks that are done wait for those that are not. All ranks encode, whatever the layout of the run.
    with joined_ranks(ParallelSection(), timeout_s=_WAIT_S) as topology, StopRequest() as stop:
        index = training_index(config.data)
        with all_ranks():
            folder.mkdir(parents=True, exist_ok=True)
            encoder = Encoder(config, index, VisionTokenizer(config.vision, topology.device), folder, num_verified)
        missing = _missing(encoder, len(index.shards), topology)
        if topology.rank == 0:
            num_shards = len(index.shards)
            logger.info("%d of %d shards are there already", num_shards - len(missing), num_shards)
        with all_ranks():
            failures = encode_rows(encoder, missing[topology.rank :: topology.world_size], topology.rank, stop)
        if any_rank(stop.is_requested):
            logger.warning("stopped on request; run again to encode the rest")
            return EXIT_REQUEUE
        with all_ranks():
            if failures:
                raise DataError(first_few(failures))
            if topology.rank == 0:
                write_table(folder, index, encoder.recipe, stored_filters(index, config.data))
                logger.info("%d samples in %s; train with data.bits_dir=%s", len(index), folder, folder)
    return EXIT_COMPLETE
