"""Arithmetic on axis-aligned boxes of a tensor: how a checkpoint tells copies of a part from other parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from bitdance_scale.parallel.partition import Piece


@dataclass(frozen=True, order=True)
class Box:
    """The elements with offsets[d] <= index[d] < offsets[d] + sizes[d]; ordered by corner."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of_piece(cls, piece: Piece) -> Box:
        """Where a rank's piece is in its global tensor."""
        return cls(tuple(piece.offsets), tuple(piece.tensor.shape))

    @classmethod
    def of_chunk(cls, chunk: ChunkStorageMetadata) -> Box:
        """A box in torch.distributed.checkpoint's terms."""
        return cls(tuple(chunk.offsets), tuple(chunk.sizes))

    @classmethod
    def of_rows(cls, start: int, num_rows: int, shape: tuple[int, ...]) -> Box:
        """Whole rows (elements of a vector) of a tensor of this shape."""
        return cls((start, *(0 for _ in shape[1:])), (num_rows, *shape[1:]))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """This box in torch.distributed.checkpoint's terms."""
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))

    @property
    def num_elements(self) -> int:
        """How many elements it has; 1 for the box of a scalar."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common part; None where there is none."""
        offsets, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if stop <= start:
                return None
            offsets.append(start)
            sizes.append(stop - start)
        return Box(tuple(offsets), tuple(sizes))

    def subtract(self, other: Box) -> list[Box]:
        """Disjoint boxes that make up this one without the other; at most two per dimension."""
        common = self.intersect(other)
        if common is None:
            return [self]
        parts = []
        offsets, sizes = list(self.offsets), list(self.sizes)
        for d in range(len(sizes)):
            start, stop = common.offsets[d], common.offsets[d] + common.sizes[d]
            if offsets[d] < start:
                parts.append(_with_range(offsets, sizes, d, offsets[d], start))
            if stop < offsets[d] + sizes[d]:
                parts.append(_with_range(offsets, sizes, d, stop, offsets[d] + sizes[d]))
            offsets[d], sizes[d] = start, stop - start
        return parts

    def cut(self, max_elements: int) -> Iterator[Box]:
        """Parts of at most `max_elements` (at least 1) elements, in memory order."""
        if self.num_elements <= max_elements:
            yield self
            return
        d = next(i for i, size in enumerate(self.sizes) if size > 1)
        step = max(max_elements // math.prod(self.sizes[d + 1 :]), 1)
        stop = self.offsets[d] + self.sizes[d]
        for start in range(self.offsets[d], stop, step):
            part = _with_range(list(self.offsets), list(self.sizes), d, start, min(start + step, stop))
            yield from part.cut(max_elements)

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box in a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.offsets, self.sizes, outer.offsets, strict=True))


def disjoint_parts(boxes: Iterable[Box]) -> Iterator[tuple[Box, Box]]:
    """Cuts overlapping boxes until none overlap: (box, a part of it). The parts cover what the boxes cover.

    The boxes are swept along the first dimension: each is compared only with those that reach its first row.
    """
    active: list[Box] = []
    for box in sorted(set(boxes)):
        if box.sizes:
            active = [part for part in active if part.offsets[0] + part.sizes[0] > box.offsets[0]]
        remainder = [box]
        for earlier in active:
            remainder = [part for piece in remainder for part in piece.subtract(earlier)]
        for part in remainder:
            yield box, part
        active.extend(remainder)


def find_overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two boxes with a common element; None where there are none. Swept as in `disjoint_parts`."""
    active: list[Box] = []
    for box in sorted(boxes):
        if box.sizes:
            active = [earlier for earlier in active if earlier.offsets[0] + earlier.sizes[0] > box.offsets[0]]
        for earlier in active:
            if earlier.intersect(box) is not None:
                return earlier, box
        active.append(box)
    return None


def _with_range(offsets: list[int], sizes: list[int], d: int, start: int, stop: int) -> Box:
    """The box with its extent along dimension `d` replaced by start..stop."""
    return Box((*offsets[:d], start, *offsets[d + 1 :]), (*sizes[:d], stop - start, *sizes[d + 1 :]))
