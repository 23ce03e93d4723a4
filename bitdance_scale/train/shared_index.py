"""The index of a data set for all ranks of a job: the first rank brings it up to date, then every rank opens it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.bit_shards import check_bits
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, default_index_dir, open_index, sources_index_dir
from bitdance_scale.data.index.report import check_skipped
from bitdance_scale.data.labels import check_labels
from bitdance_scale.data.plan.selection import store_selection
from bitdance_scale.data.storage.shards import expand_shards, expand_sources
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank


@dataclass(frozen=True)
class _Built:
    """What the first rank has built."""

    index_dir: str
    hash: str
    shards_per_source: list[int]


def training_index(data: DataSection) -> Index:
    """The index of everything that a run trains on, divided into its sources.

    Args:
        data: shards or sources, captions, index folder.

    Raises:
        DataError: on every rank, what is wrong with the shards; that they lost too many samples, too.
    """
    built = on_first_rank(lambda: _build_sources(data))
    return _open(built, data.max_skipped_share).divided(built.shards_per_source)


def labelled_index(config: RunConfig) -> Index:
    """`training_index` of a run, in which every image has the class and the stored bits that the run needs.

    Raises:
        DataError: on every rank, as `training_index`, or which labels or bits are missing or wrong.
    """
    index = training_index(config.data)
    if not config.model.parts.has_text:
        on_first_rank(lambda: check_labels(index, config))
    if config.data.bits_dir:
        on_first_rank(lambda: check_bits(index, config))
    return index


def image_index(specs: Sequence[str], index_dir: str, max_skipped_share: float) -> Index:
    """The index of shards of which only the images are needed; otherwise as `training_index`.

    Args:
        specs: as `data.shards`.
        index_dir: as `data.index_dir`; empty: beside the first shard.
        max_skipped_share: share of samples that the shards may have lost.
    """
    return _open(on_first_rank(lambda: _build_images(specs, index_dir)), max_skipped_share)


def _build_sources(data: DataSection) -> _Built:
    # Tar headers are read once: nothing for a cache.
    stores, sources = Stores(dataclasses.replace(data.s3, cache_dir="")), data.active_sources
    if len(sources) == 1:
        by_source = [expand_shards(sources[0].shards, stores=stores)]
        index_dir = data.index_dir or default_index_dir(by_source[0])
    else:
        by_source = expand_sources(sources, stores)
        index_dir = data.index_dir or sources_index_dir([source.name for source in sources], by_source[0])
    shards = [path for paths in by_source for path in paths]
    captions = [choice.source for choice in data.captions]
    index = build_index(shards, index_dir, captions=captions, stores=stores)
    num_shards = [len(paths) for paths in by_source]
    store_selection(index.divided(num_shards), data)
    return _Built(index_dir, index.hash, num_shards)


def _build_images(specs: Sequence[str], index_dir: str) -> _Built:
    shards = expand_shards(specs)
    index_dir = index_dir or default_index_dir(shards)
    index = build_index(shards, index_dir, captions=[DEFAULT_SOURCE], stores=Stores())
    return _Built(index_dir, index.hash, [len(shards)])


def _open(built: _Built, max_skipped_share: float) -> Index:
    with all_ranks():
        index = open_index(built.index_dir, is_verified=True)
        if index.hash != built.hash:
            raise DataError(
                f"{built.index_dir}: another job builds its index there, and has replaced this run's while it started. "
                "Start again, or set data.index_dir to a folder of this run's own."
            )
        check_skipped(index, max_skipped_share)
    return index
