"""The index of a data set, for all ranks of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from bitdance_scale.config.schema import DataSection
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index import Index, default_index_dir, open_index, sources_index_dir
from bitdance_scale.data.index_build import build_index
from bitdance_scale.data.index_report import check_losses
from bitdance_scale.data.shards import expand_shards, expand_sources
from bitdance_scale.data.store import Stores
from bitdance_scale.errors import DataError
from bitdance_scale.parallel.agreement import together


def training_index(data: DataSection, device: torch.device) -> Index:
    """The index of everything that a run trains on, divided into its sources.

    The first rank finds the shards and brings the index up to date; then every rank opens it.

    Args:
        data: shards or sources, captions, index folder.
        device: where the job's ranks communicate.

    Raises:
        DataError: on every rank, what is wrong with the shards; that they lost too many samples, too.
    """
    # Tar headers are read once: nothing for a cache.
    stores, sources = Stores(dataclasses.replace(data.s3, cache_dir="")), data.active_sources
    by_source: list[list[str]] = []
    index_dir = data.index_dir
    with together(device):
        if _is_first():
            if len(sources) == 1:
                by_source = [expand_shards(sources[0].shards, stores=stores)]
                index_dir = index_dir or default_index_dir(by_source[0])
            else:
                by_source = expand_sources(sources, stores)
                index_dir = index_dir or sources_index_dir([source.name for source in sources], by_source[0])
    captions = [choice.source for choice in data.captions]
    index = _built_once(
        [path for paths in by_source for path in paths], index_dir, captions, data.max_hole_share, device, stores
    )
    return index.divided(_from_first([len(paths) for paths in by_source]))


def image_index(specs: Sequence[str], index_dir: str, max_hole_share: float, device: torch.device) -> Index:
    """The index of shards of which only the images are needed; otherwise as `training_index`.

    Args:
        specs: as `data.shards`.
        index_dir: as `data.index_dir`; empty: beside the first shard.
        max_hole_share: share of samples that the shards may have lost.
        device: where the job's ranks communicate.
    """
    shards: list[str] = []
    with together(device):
        if _is_first():
            shards = expand_shards(specs)
            index_dir = index_dir or default_index_dir(shards)
    return _built_once(shards, index_dir, [DEFAULT_SOURCE], max_hole_share, device, Stores())


def _built_once(
    shards: Sequence[str],
    index_dir: str,
    captions: Sequence[str],
    max_hole_share: float,
    device: torch.device,
    stores: Stores,
) -> Index:
    """Only the first rank's shards and folder count."""
    built = ""
    with together(device):
        if _is_first():
            built = build_index(shards, index_dir, captions=captions, stores=stores).hash
    index_dir, built = _from_first((index_dir, built))
    with together(device):
        index = open_index(index_dir)
        if index.hash != built:
            raise DataError(
                f"{index_dir}: another job builds its index there, and has replaced this run's while it started. Start "
                "again, or set data.index_dir to a folder of this run's own."
            )
        check_losses(index, max_hole_share)
    return index


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_first(value: object) -> object:
    """A small value of the first rank, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
