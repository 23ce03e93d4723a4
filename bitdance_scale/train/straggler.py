"""Which rank is slow: its own forward passes per unit of work, compared with the other replicas.

In synchronous training the wall-clock time of a step is the same on all ranks. What tells them apart is the time within
`Phase.FORWARD`, which holds a rank's own computation, over the FLOPs of its own micro-batches, as packs differ. A rank
is compared with those of the other replicas that have the same pipeline and tensor rank, and hence the same layers.

What this sees: a slow device, a slow host that launches late, and on one rank of a replica also a slow link within it.
What it cannot see: collectives inside the forward pass wait for the slowest, so all ranks of a tensor-parallel group
look alike, and under ZeRO-3, whose gathers span the replicas, all ranks do. So do those of tokenizer training, whose
entropy loss is a mean over the ranks; it has no such report. A device that is slow in the backward pass or in
communication alone is not seen either.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, listening

logger = logging.getLogger(__name__)

WINDOW_STEPS = 32
MIN_EXCESS = 0.1
"""A rank this share above the others is named."""

_Span = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Straggler:
    """The slowest rank.

    Attributes:
        rank: global rank; -1: none is `MIN_EXCESS` behind the others.
        excess: share by which the slowest is above the median of the others; 0 where there is nothing to compare.
    """

    rank: int = -1
    excess: float = 0.0


def find_straggler(costs: Sequence[float], groups: Sequence[int]) -> Straggler:
    """The rank that is slowest in comparison with the others of its group.

    Args:
        costs: seconds per unit of work by rank; NaN: not known.
        groups: ranks with equal numbers do the same.
    """
    by_group: dict[int, dict[int, float]] = {}
    for rank, (cost, group) in enumerate(zip(costs, groups, strict=True)):
        if math.isfinite(cost):
            by_group.setdefault(group, {})[rank] = cost
    slowest = Straggler()
    for ranks in by_group.values():
        # The others' median is highest for the fastest rank and lowest for the slowest: only that one can be behind.
        rank = max(ranks, key=lambda rank: ranks[rank])
        others = [cost for other, cost in ranks.items() if other != rank]
        if others and ranks[rank] / statistics.median(others) - 1 > slowest.excess:
            slowest = Straggler(rank, ranks[rank] / statistics.median(others) - 1)
    return slowest if slowest.excess >= MIN_EXCESS else Straggler(excess=slowest.excess)


class StragglerWatch:
    """Measures this rank's forward passes and compares them with those of the others; all ranks call it alike.

    On CUDA it records events, which are read in `report`; a step waits for nothing. A step's seconds per unit of work
    are one value, and the median of the last `WINDOW_STEPS` values counts: a single slow step makes no straggler.

    Args:
        topology: the ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._uses_events = topology.device.type == "cuda"
        self._costs: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._spans: list[_Span] = []
        self._seconds = 0.0
        self._waiting: list[tuple[list[_Span], float, float]] = []
        self._warned_rank = -1

    def listening(self) -> AbstractContextManager[None]:
        """Measures the forward passes within the block."""
        return listening(self._measure)

    @contextlib.contextmanager
    def _measure(self, kind: Phase) -> Iterator[None]:
        if kind is not Phase.FORWARD:
            yield
        elif self._uses_events:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            begun_s = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun_s

    def add(self, work: float) -> None:
        """Ends a step.

        Args:
            work: what this rank's forward passes had to do, in any unit that is the same on all ranks.
        """
        self._waiting.append((self._spans, self._seconds, work))
        self._spans, self._seconds = [], 0.0

    def report(self, step: int) -> Straggler:
        """The slowest rank of the last steps, the same on all ranks; one small gather.

        Args:
            step: optimiser steps taken, for the warning.
        """
        for spans, host_s, work in self._waiting:
            for _, end in spans:
                end.synchronize()
            seconds = host_s + sum(begin.elapsed_time(end) for begin, end in spans) / 1000
            if work > 0 and seconds > 0:
                self._costs.append(seconds / work)
        self._waiting = []
        topology = self._topology
        if topology.data_size == 1:
            return Straggler()
        cost = statistics.median(self._costs) if self._costs else math.nan
        group = topology.pipeline_rank * topology.tensor_size + topology.tensor_rank
        mine = torch.tensor([cost, group, len(self._costs)], dtype=torch.float64, device=topology.device)
        rows = [torch.empty_like(mine) for _ in range(topology.world_size)]
        dist.all_gather(rows, mine)
        costs, groups, lengths = torch.stack(rows).T.tolist()
        found = find_straggler(costs, [int(number) for number in groups])
        self._warn(step, found, is_window_full=min(lengths) == WINDOW_STEPS)
        return found

    def _warn(self, step: int, found: Straggler, *, is_window_full: bool) -> None:
        """Names a rank that has been slow over a whole window, once until another one is or none."""
        if not is_window_full or found.rank == self._warned_rank:
            return
        self._warned_rank = found.rank
        if found.rank < 0:
            return
        node = [socket.gethostname()]
        dist.broadcast_object_list(node, src=found.rank)
        if self._topology.rank == 0:
            logger.warning(
                "step %d: rank %d (node %s) is slow: over the last %d steps its forward passes took %.0f %% longer per "
                "FLOP than those of the other replicas",
                step,
                found.rank,
                node[0],
                WINDOW_STEPS,
                100 * found.excess,
            )
