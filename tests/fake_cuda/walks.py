"""Walks of chosen ranks, each made once and kept."""

from __future__ import annotations

import functools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.fake_cuda.device import start
from tests.fake_cuda.recording import Record

_TIMEOUT_S = 900.0
_AT_ONCE = 2


@dataclass(frozen=True)
class Walk:
    """The walk of a rank.

    Attributes:
        num_micro_batches: of the step.
        num_positions: of a micro-batch.
        device: of the rank's tensors.
        record: what was seen.
    """

    num_micro_batches: int
    num_positions: int
    device: str
    record: Record

    def waits(self, *phases: str) -> Counter[tuple[str, str]]:
        """(what, place) -> waits of the host in these phases."""
        found: Counter[tuple[str, str]] = Counter()
        for (phase, what, place), number in self.record.waits.items():
            if phase in phases:
                found[what, place] += number
        return found


@functools.cache
def walk(config: str, world: int, rank: int, overrides: tuple[str, ...] = (), plant: str = "") -> Walk:
    """The walk of a rank of a job.

    Args:
        config: name of a shipped configuration.
        world: ranks of the job.
        rank: which of them.
        overrides: settings.
        plant: a fault, see `walk.py`.

    Raises:
        RuntimeError: the walk fails; with the error.
    """
    arguments = [config, "--world", str(world), "--rank", str(rank), *overrides]
    values = json.loads(start("tests.fake_cuda.walk", arguments + (["--plant", plant] if plant else []), _TIMEOUT_S))
    return Walk(**{**values, "record": Record.of_json(values["record"])})


def walk_ranks(config: str, world: int, ranks: tuple[int, ...], overrides: tuple[str, ...] = ()) -> dict[int, Walk]:
    """The walks of several ranks, a few at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(ranks, pool.map(lambda rank: walk(config, world, rank, overrides), ranks), strict=True))
