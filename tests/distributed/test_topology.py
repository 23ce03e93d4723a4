"""The groups of a replica."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bitdance_scale.parallel.topology import _host_group, start_process_group
from tests.distributed.spawn import run_ranks


def _sums(rank: int) -> tuple[int, list[int]]:
    """(size of the host group of this rank's replica, sums of the ranks over it)."""
    start_process_group(timeout_s=60)
    # Replicas of neighbours, as tensor-parallel ranks are.
    group = _host_group((0, 1, 2) if rank < 3 else (3,))
    found = []
    for _ in range(2):
        total = torch.tensor([rank])
        dist.all_reduce(total, group=group)
        found.append(int(total))
    return dist.get_world_size(group), found


def test_replicas_make_their_host_groups_by_themselves():
    assert run_ranks(4, _sums) == [(3, [3, 3])] * 3 + [(1, [3, 3])]
