"""The index of a data set, for all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from bitdance_scale.data.index import Index, build_index, default_index_dir, open_index
from bitdance_scale.data.shards import expand_shards
from bitdance_scale.parallel.agreement import together


def shared_index(specs: Sequence[str], index_dir: str, device: torch.device) -> Index:
    """Brought up to date by rank 0, then opened by every rank.

    Args:
        specs: `data.shards`.
        index_dir: `data.index_dir`; empty: beside the first shard.
        device: where the job's ranks communicate.

    Raises:
        DataError: on every rank, what is wrong with the shards.
    """
    with together(device):
        if not dist.is_initialized() or dist.get_rank() == 0:
            shards = expand_shards(specs)
            build_index(shards, index_dir or default_index_dir(shards))
    with together(device):
        index = open_index(index_dir or default_index_dir(expand_shards(specs)))
    return index
