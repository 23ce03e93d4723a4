"""Walks of chosen ranks, each made once and kept."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.parallel.partition import Placement
from tests.fake_cuda.recording import Record
from tests.fake_cuda.server import in_parallel, server

_TIMEOUT_S = 900.0
WHOLE_LIFE = ("steps", "save", "evaluate")
AROUND_MICRO_BATCHES = ("count_targets", "_reduce_losses")
"""Functions that wait once a step: the counts before all micro-batches, the losses after them."""


@dataclass(frozen=True)
class Request:
    """Which walk.

    Attributes:
        config: name of a shipped configuration.
        world: ranks of the job.
        rank: which of them.
        overrides: settings.
        vocab: entries of the tokenizer.
        parts: of `WHOLE_LIFE`, which; without any the rank is only built.
        is_uneven: whether the packs are of all lengths that occur, rather than one pack again and again.
        plant: a fault, of `plants.py`.
    """

    config: str
    world: int
    rank: int
    overrides: tuple[str, ...] = ()
    vocab: int = 151940
    parts: tuple[str, ...] = WHOLE_LIFE
    is_uneven: bool = False
    plant: str = ""


@dataclass(frozen=True)
class SavedTensor:
    """What a rank holds of a tensor of a checkpoint: shape and dtype of the whole, and boxes of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Walk:
    """The walk of a rank.

    Attributes:
        request: which walk it is.
        coordinates: ranks on the tensor, data and pipeline axis.
        lengths: positions of each micro-batch.
        num_layers: layers of the rank.
        device: of its tensors.
        record: what was seen.
        held: bytes by role (`parallel/memory_parts.py`) between the last backward pass and the update.
        peak: bytes by role at the fullest moment of the second step.
        building_peak: the most bytes before the first step.
        most_activations: the most bytes of activations in the second step.
        makers: bytes at the peak by role and the function that made them (`parallel/storage_log.py`).
        saved: what the rank holds of a checkpoint, by name.
        placements: where its parameters lie in the whole ones, by name.
        groups: names of its parameters, by the optimiser's group, in order.
        cpu_s: seconds of processor time that it took.
    """

    request: Request
    coordinates: tuple[int, int, int]
    lengths: tuple[int, ...]
    num_layers: int
    device: str
    record: Record
    held: dict[str, int]
    peak: dict[str, int]
    building_peak: int
    most_activations: int
    makers: Counter[tuple[str, str]]
    saved: dict[str, SavedTensor]
    placements: dict[str, Placement]
    groups: tuple[tuple[str, ...], ...]
    cpu_s: float

    @property
    def num_micro_batches(self) -> int:
        """Of a step."""
        return len(self.lengths)

    @property
    def num_positions(self) -> int:
        """Of the first micro-batch."""
        return self.lengths[0]

    def waits(self, *phases: str) -> Counter[tuple[str, str]]:
        """(what, place) -> waits of the host in these phases."""
        found: Counter[tuple[str, str]] = Counter()
        for (phase, what, place), number in self.record.waits.items():
            if phase in phases:
                found[what, place] += number
        return found

    def waits_of_micro_batches(self) -> Counter[tuple[str, str]]:
        """(what, place) -> waits within the micro-batches of a step, all of them together."""
        found = self.waits("micro-batches")
        return Counter({key: n for key, n in found.items() if key[1].split()[-1] not in AROUND_MICRO_BATCHES})


@functools.cache
def walk_of(request: Request) -> Walk:
    """A walk.

    Raises:
        RuntimeError: it fails; with the error.
    """
    found = server("cuda").call("tests.fake_cuda.walk:walk_here", request, timeout_s=_TIMEOUT_S)
    assert isinstance(found, Walk), "what `walk_here` returns"
    return found


def walk(config: str, world: int, rank: int, overrides: tuple[str, ...] = (), plant: str = "") -> Walk:
    """The steps of a rank, without a checkpoint or an evaluation; arguments as of `Request`.

    Raises:
        RuntimeError: the walk fails; with the error.
    """
    return walk_of(Request(config, world, rank, overrides, parts=("steps",), plant=plant))


def walk_ranks(config: str, world: int, ranks: Iterable[int], overrides: tuple[str, ...] = ()) -> dict[int, Walk]:
    """`walk` of several ranks, a few at a time."""
    return walks_of([Request(config, world, rank, overrides, parts=("steps",)) for rank in ranks])


def walks_of(requests: Iterable[Request]) -> dict[int, Walk]:
    """Walks of several ranks of a job, by rank, a few at a time."""
    found = in_parallel([functools.partial(walk_of, request) for request in requests])
    return {walked.request.rank: walked for walked in found}
