"""Which boxes of the global tensors a rank holds: the layout-free view of parameters and optimiser state.

A parameter is cut twice. Tensor parallelism gives a rank a slice of it (`Placement`). The optimiser engine then cuts
the row-major flattening of that slice between data-parallel ranks, at any element. Both cuts together are expressed as
n-d boxes of the global tensor (`Piece`), which are views of the memory that the engines train in. A checkpoint
therefore neither knows the layout nor gathers a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """One box of a global tensor.

    Attributes:
        offsets: corner of the box in the global tensor.
        tensor: the box's values, a view into live storage where possible: loading writes through it.
    """

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class ShardedValue:
    """What this rank holds of one global tensor.

    Attributes:
        global_shape: shape of the whole tensor.
        dtype: dtype of the whole tensor and of every piece.
        pieces: boxes held here, none empty, no two overlapping. Other ranks may hold the same or overlapping boxes
            (replicas), whose values are assumed to be equal.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Placement:
    """Where a rank's slice of a parameter lies in the global tensor.

    Attributes:
        global_shape: shape of the whole parameter, without padding.
        local_shape: shape of this rank's slice, padding included.
        dim: the dimension that is split; None if every rank holds the whole parameter.
        blocks: (local_start, global_start, length) along `dim`, in local order. A weight that stacks several matrices,
            each split separately, has one block per matrix (local `[gate_r; up_r]`). Local rows outside the blocks are
            padding (vocabulary) and belong to no global tensor.
    """

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.dim is None:
            assert not self.blocks and self.local_shape == self.global_shape, "a replica holds the whole parameter"
            return
        end = 0
        for local_start, global_start, length in self.blocks:
            assert local_start >= end and length > 0, f"blocks {self.blocks} must be ordered, disjoint and not empty"
            end = local_start + length
            assert 0 <= global_start <= self.global_shape[self.dim] - length and end <= self.local_shape[self.dim], (
                f"block {(local_start, global_start, length)} leaves {self.local_shape} or {self.global_shape}"
            )

    @classmethod
    def replicated(cls, shape: tuple[int, ...]) -> Placement:
        """A parameter that every rank holds whole."""
        return cls(tuple(shape), tuple(shape))

    @classmethod
    def split(
        cls,
        local_shape: tuple[int, ...],
        dim: int,
        rank: int,
        size: int,
        num_chunks: int = 1,
        valid_length: int | None = None,
    ) -> Placement:
        """One rank's equal share along `dim`.

        Args:
            local_shape: shape of the share, padding included.
            dim: the dimension that is split.
            rank: tensor-parallel rank.
            size: tensor-parallel ranks.
            num_chunks: matrices stacked along `dim`, each split separately; the local tensor stacks their shares.
            valid_length: global length along `dim` without the padding that follows (vocabulary); None if there is
            none.
        """
        padded_length = local_shape[dim] * size
        length = padded_length if valid_length is None else valid_length
        assert local_shape[dim] % num_chunks == 0, f"{num_chunks} chunks do not divide dim {dim} of {local_shape}"
        assert length <= padded_length, f"{size} shares {local_shape} are less than {length} along dim {dim}"
        assert num_chunks == 1 or length == padded_length, "padding is at the end, so it needs num_chunks = 1"
        share = local_shape[dim] // num_chunks
        starts = [(chunk * size + rank) * share for chunk in range(num_chunks)]
        blocks = [(i * share, start, min(share, length - start)) for i, start in enumerate(starts) if start < length]
        global_shape = (*local_shape[:dim], length, *local_shape[dim + 1 :])
        return cls(global_shape, tuple(local_shape), dim, tuple(blocks))

    def local_part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a whole parameter, `global_shape` -> `local_shape`; padding is zero."""
        assert tuple(whole.shape) == self.global_shape, f"{tuple(whole.shape)} is not the whole {self.global_shape}"
        if self.dim is None:
            return whole
        part = whole.new_zeros(self.local_shape)
        for local_start, global_start, length in self.blocks:
            part.narrow(self.dim, local_start, length).copy_(whole.narrow(self.dim, global_start, length))
        return part


@dataclass(frozen=True)
class ConsumedValue:
    """A tensor that is handed over as soon as it is read, so that it need not be held.

    Attributes:
        placement: where this rank's slice of it lies.
        dtype: in which the slice is handed over.
        device: where it is handed over.
        consume: takes the slice, `placement.local_shape`.
    """

    placement: Placement
    dtype: torch.dtype
    device: torch.device
    consume: Callable[[torch.Tensor], None]

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.placement.global_shape

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The boxes of the slice; their tensors have no memory."""
        shape = torch.empty(self.placement.local_shape, dtype=self.dtype, device="meta")
        return whole_pieces(shape, self.placement).pieces

    def make_slice(self) -> torch.Tensor:
        """Memory for the slice."""
        return torch.empty(self.placement.local_shape, dtype=self.dtype, device=self.device)


def whole_pieces(tensor: torch.Tensor, placement: Placement) -> ShardedValue:
    """Pieces of a rank's whole slice; they are views of `tensor`."""
    assert tuple(tensor.shape) == placement.local_shape, f"{tuple(tensor.shape)} is not {placement.local_shape}"
    return _sharded(tensor.dtype, placement, _placed(tensor.detach(), (0,) * tensor.ndim, placement))


def fragment_pieces(flat: torch.Tensor, start: int, placement: Placement) -> ShardedValue:
    """Pieces of a flat fragment of a rank's slice; they are views of `flat`.

    Args:
        flat: [length], elements start..start+length of the row-major flattening of the local tensor. An empty fragment
            may start anywhere: ZeRO leaves the last ranks nothing of a short parameter.
        start: index of the first element.
        placement: shape of the local tensor and where it lies in the global one.
    """
    stop = start + flat.numel()
    assert flat.ndim == 1 and (start == stop or 0 <= start < stop <= math.prod(placement.local_shape)), (
        f"elements {start}..{stop} of a flattened {placement.local_shape}"
    )
    flat = flat.detach()
    pieces: list[Piece] = []
    taken = 0
    for offsets, sizes in _boxes_of_range(start, stop, placement.local_shape):
        box = flat[taken : taken + math.prod(sizes)].view(sizes)
        taken += box.numel()
        pieces.extend(_placed(box, offsets, placement))
    return _sharded(flat.dtype, placement, pieces)


def _sharded(dtype: torch.dtype, placement: Placement, pieces: list[Piece]) -> ShardedValue:
    return ShardedValue(placement.global_shape, dtype, tuple(pieces))


def _boxes_of_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that make up elements start..stop of a row-major tensor, in memory order.

    At most 2 * ndim - 1 boxes: a partial first row, the full rows, and a partial last row. Partial rows are cut again.
    """
    if stop <= start:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if head:
        end_of_row = row if last > first else tail
        yield from _in_row(first, head, end_of_row, shape)
        if last == first:
            return
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        yield from _in_row(last, 0, tail, shape)


def _in_row(
    index: int, start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in _boxes_of_range(start, stop, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def _placed(box: torch.Tensor, offsets: tuple[int, ...], placement: Placement) -> list[Piece]:
    """A box of the local tensor as boxes of the global one, cut at the borders of the placement's blocks."""
    dim = placement.dim
    if dim is None:
        return [Piece(offsets, box)] if box.numel() else []
    pieces = []
    box_start, box_stop = offsets[dim], offsets[dim] + box.shape[dim]
    for local_start, global_start, length in placement.blocks:
        start, stop = max(box_start, local_start), min(box_stop, local_start + length)
        if stop > start:
            corner = (*offsets[:dim], global_start + start - local_start, *offsets[dim + 1 :])
            pieces.append(Piece(corner, box.narrow(dim, start - box_start, stop - start)))
    return pieces
