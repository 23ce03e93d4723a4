"""A copy, in host memory, of what this rank writes of a checkpoint, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.sharded import planned_boxes, values_in
from bitdance_scale.parallel.partition import Piece, ShardedValue
from bitdance_scale.parallel.pinned import in_blocks

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class _Place:
    """Where the values of a box are copied to."""

    name: str
    box: Box
    room: torch.Tensor


class Stager:
    """Copies into memory that is kept from one checkpoint to the next, pinned where there is CUDA.

    Every element is copied by one rank, the one that writes it: all ranks together hold one checkpoint.

    Args:
        group: the ranks of the run; None: all, or this process alone without a process group.
        device: of the values.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._is_cuda = group, device.type == "cuda"
        self._places: list[_Place] = []
        self._copied: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory that is filled; pinned, it takes `pinned_bytes` of it and what is left free in blocks."""
        return sum(place.room.nbytes for place in self._places)

    def prepare(self, values: Mapping[str, ShardedValue]) -> None:
        """Takes the memory before the first copy, which would wait for it; a collective.

        Args:
            values: as for `stage`.
        """
        if not self._places:
            self._places = self._make_room(values)

    def stage(self, values: Mapping[str, ShardedValue]) -> dict[str, ShardedValue]:
        """Copies the values as they are after all work that the device has been given; `prepare` comes first.

        Under CUDA the copy goes on after the call, ahead of any later change; `wait` comes before it is read.

        Args:
            values: what this rank holds: every time of the same names, shapes and boxes.

        Returns:
            What this rank writes of them.
        """
        pieces: dict[str, list[Piece]] = {}
        for place in self._places:
            place.room.copy_(values_in(values[place.name], place.box), non_blocking=True)
            pieces.setdefault(place.name, []).append(Piece(place.box.offsets, place.room))
        if self._is_cuda:
            self._copied = torch.cuda.current_stream().record_event()
        return {
            name: ShardedValue(values[name].global_shape, values[name].dtype, tuple(held))
            for name, held in pieces.items()
        }

    def wait(self) -> None:
        """Returns when the last copy is there."""
        if self._copied is not None:
            self._copied.synchronize()

    def _make_room(self, values: Mapping[str, ShardedValue]) -> list[_Place]:
        boxes = planned_boxes(values, self._group)
        sizes = [(name, box, box.num_elements * values[name].dtype.itemsize) for name in boxes for box in boxes[name]]
        starts, used = in_blocks([-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for _, _, size in sizes])
        # Zeros: the pages are there from now on.
        blocks = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for num_bytes in used]
        places = []
        for (name, box, size), (block, start) in zip(sizes, starts, strict=True):
            room = blocks[block][start : start + size].view(values[name].dtype).view(box.sizes)
            places.append(_Place(name, box, room))
        return places
