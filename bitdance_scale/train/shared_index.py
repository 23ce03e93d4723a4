"""The index of a data set, for all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from bitdance_scale.config.schema import DataSection
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index import Index, default_index_dir, open_index, sources_index_dir
from bitdance_scale.data.index_build import build_index
from bitdance_scale.data.index_report import check_losses
from bitdance_scale.data.shards import expand_shards, expand_sources
from bitdance_scale.errors import DataError
from bitdance_scale.parallel.agreement import together


def training_index(data: DataSection, device: torch.device) -> Index:
    """The index of everything that a run trains on, divided into its sources; otherwise as `shared_index`."""
    sources = data.active_sources
    captions = [choice.source for choice in data.captions]
    if len(sources) == 1:
        return shared_index(sources[0].shards, data.index_dir, data.max_hole_share, device, captions)
    with together(device):
        by_source = expand_sources(sources)
    index_dir = data.index_dir or sources_index_dir([source.name for source in sources], by_source[0])
    shards = [path for paths in by_source for path in paths]
    index = _built_once(shards, index_dir, data.max_hole_share, device, captions)
    return index.divided([len(paths) for paths in by_source])


def shared_index(
    specs: Sequence[str],
    index_dir: str,
    max_hole_share: float,
    device: torch.device,
    captions: Sequence[str] = (DEFAULT_SOURCE,),
) -> Index:
    """Brought up to date by rank 0, then opened by every rank.

    Args:
        specs: `data.shards`.
        index_dir: `data.index_dir`; empty: beside the first shard.
        max_hole_share: share of samples that the shards may have lost.
        device: where the job's ranks communicate.
        captions: sources of captions that are needed.

    Raises:
        DataError: on every rank, what is wrong with the shards; that they lost too much, too.
    """
    with together(device):
        shards = expand_shards(specs)
    return _built_once(shards, index_dir or default_index_dir(shards), max_hole_share, device, captions)


def _built_once(
    shards: Sequence[str], index_dir: str, max_hole_share: float, device: torch.device, captions: Sequence[str]
) -> Index:
    with together(device):
        if not dist.is_initialized() or dist.get_rank() == 0:
            build_index(shards, index_dir, captions=captions)
    with together(device):
        index = open_index(index_dir)
        if [entry.path for entry in index.shards] != list(shards):
            raise DataError(
                f"{index_dir}: the index is of other shards than the configuration names now: shards came or went while "
                "the job started, or another job builds its index there. Start again, or set data.index_dir to a folder "
                "of this run's own."
            )
        check_losses(index, max_hole_share)
    return index
