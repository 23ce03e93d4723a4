"""Who writes what of a checkpoint, from what walked ranks hold; in large jobs, from what the others must hold.

The plan itself is made by the checkpoint's own planner (`checkpoint/sharded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bitdance_scale.checkpoint.boxes import Box, find_overlap
from bitdance_scale.checkpoint.run_checkpoint import MODEL_PREFIX, OPTIMIZER_PREFIX
from bitdance_scale.checkpoint.sharded import DEFAULT_MAX_FILE_BYTES, _SavePieces
from bitdance_scale.checkpoint.tensor_storage import write_data_of
from bitdance_scale.parallel.partition import Piece, ShardedValue, fragment_pieces
from tests.fake_cuda.walks import SavedTensor, Walk

Saved = dict[str, SavedTensor]
# DeepSpeed pads a flat buffer to a multiple of so many elements per data-parallel rank.
_ALIGNMENT = 2
_KINDS = ("master", "exp_avg", "exp_avg_sq")


def written_boxes(held: Mapping[int, Saved]) -> dict[str, list[tuple[int, Box]]]:
    """(rank, box) of all that is written, by tensor.

    Args:
        held: of all ranks of a job.
    """
    plans = []
    for rank in sorted(held):
        planner = _SavePieces(DEFAULT_MAX_FILE_BYTES)
        planner.set_up_planner({name: _as_value(saved) for name, saved in held[rank].items()})
        plans.append(planner.create_local_plan())
    shares, _ = planner.create_global_plan(plans)
    written: dict[str, list[tuple[int, Box]]] = {}
    for rank, share in zip(sorted(held), shares, strict=True):
        for item in share.items:
            written.setdefault(item.index.fqn, []).append((rank, Box.of_chunk(write_data_of(item).chunk)))
    return written


def problems(held: Mapping[int, Saved], written: Mapping[str, list[tuple[int, Box]]]) -> list[str]:
    """Elements that nobody writes, or more than one rank, as sentences; none where each is written once.

    Args:
        held: of all ranks of a job.
        written: by `written_boxes`.
    """
    shapes = {name: saved.shape for rank_held in held.values() for name, saved in rank_held.items()}
    found = [f"{name}: nobody writes it" for name in sorted(shapes.keys() - written.keys())]
    for name, parts in written.items():
        boxes = [box for _, box in parts]
        num_written, num_all = sum(box.num_elements for box in boxes), math.prod(shapes[name])
        if num_written != num_all:
            found.append(f"{name}: {num_written} of {num_all} elements are written")
        overlap = find_overlap(boxes)
        if overlap is not None:
            found.append(f"{name}: {overlap[0]} and {overlap[1]} are written by two")
        for rank, box in parts:
            if not any(mine.intersect(box) == box for mine in held[rank][name].boxes):
                found.append(f"{name}: rank {rank} does not hold {box}, which it is to write")
    return found


def held_by(data_rank: int, data_size: int, sibling: Walk) -> Saved:
    """What a rank holds by formula under ZeRO-1 and 2, where a rank of the same stage and tensor rank was walked.

    Weights are whole. Masters and moments are flattened in the order of the parameters, group by group, padded, and
    divided into equal parts.

    Args:
        data_rank: of the rank.
        data_size: replicas.
        sibling: the walk.
    """
    held = {name: saved for name, saved in sibling.saved.items() if name.startswith(MODEL_PREFIX)}
    for group in sibling.groups:
        num_all = sum(math.prod(sibling.placements[name].local_shape) for name in group)
        share = -(-num_all // (_ALIGNMENT * data_size)) * _ALIGNMENT
        start = 0
        for name in group:
            placement = sibling.placements[name]
            stop = start + math.prod(placement.local_shape)
            first, last = max(start, data_rank * share), min(stop, (data_rank + 1) * share)
            if first < last:
                flat = torch.empty(last - first, device="meta")
                boxes = tuple(map(Box.of_piece, fragment_pieces(flat, first - start, placement).pieces))
                for kind in _KINDS:
                    held[f"{OPTIMIZER_PREFIX}{kind}.{name}"] = SavedTensor(placement.global_shape, flat.dtype, boxes)
            start = stop
    return held


def _as_value(saved: SavedTensor) -> ShardedValue:
    pieces = tuple(Piece(box.offsets, torch.empty(box.sizes, dtype=saved.dtype, device="meta")) for box in saved.boxes)
    return ShardedValue(saved.shape, saved.dtype, pieces)
