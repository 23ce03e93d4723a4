"""Saving holds one piece of a tensor at a time, loading none: measured on real ranks, beside wasteful versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from bitdance_scale.checkpoint import sharded, tensor_storage
from bitdance_scale.checkpoint.sharded import load_sharded, save_sharded
from bitdance_scale.parallel.partition import Piece, ShardedValue
from tests.distributed.peak_memory import PeakMemory
from tests.distributed.spawn import run_ranks

MIB = 2**20
NUM_RANKS = 2
# Four tensors of 96 MiB: a rank holds 192 MiB of 384, in pieces larger than a file.
SHAPE = (6144, 4096)
NUM_TENSORS = 4
FILE_BYTES = 32 * MIB
SHARE_BYTES = NUM_TENSORS * SHAPE[0] * SHAPE[1] * 4 // NUM_RANKS
# Descriptions of boxes, buffers of the process group, the 256 KiB a file is hashed through, pages the allocator keeps.
# Clearly less than a tensor (96 MiB) and a rank's share (192 MiB).
SLACK_BYTES = 8 * MIB
SAVE_BOUND_BYTES = FILE_BYTES + SLACK_BYTES
LOAD_BOUND_BYTES = SLACK_BYTES


def _values(rank: int, fill: float, dim: int, is_strided: bool = False) -> dict[str, ShardedValue]:
    """Halves of the tensors along `dim`; strided values cannot be written as they lie in memory."""
    values = {}
    for number in range(NUM_TENSORS):
        shape, offsets = list(SHAPE), [0, 0]
        shape[dim] //= NUM_RANKS
        offsets[dim] = rank * shape[dim]
        tensor = torch.full(shape[::-1], fill + number).t() if is_strided else torch.full(shape, fill + number)
        piece = Piece(tuple(offsets), tensor)
        values[f"w{number}"] = ShardedValue(SHAPE, torch.float32, (piece,))
    return values


@contextlib.contextmanager
def _holding_too_much(what: str) -> Iterator[None]:
    """Makes saving or loading as wasteful as a simple implementation is."""
    resolve = sharded._SavePieces.resolve_data

    def resolve_whole_tensor(planner, item):
        whole = torch.zeros(SHAPE)
        part = resolve(planner, item)
        whole[: part.shape[0]] = part
        whole.add_(1.0).sub_(1.0)
        return whole[: part.shape[0]]

    @contextlib.contextmanager
    def read_whole_file(path, *_):
        content = load(path.read_bytes())
        yield mock.Mock(get_slice=lambda key: _Slice(content[key]))

    with contextlib.ExitStack() as stack:
        if what == "tensor":
            stack.enter_context(mock.patch.object(sharded._SavePieces, "resolve_data", resolve_whole_tensor))
        elif what == "file":
            stack.enter_context(mock.patch.object(tensor_storage, "opened", read_whole_file))
        yield


class _Slice:
    """The interface of a safetensors slice, for a tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, where: tuple[slice, ...]) -> torch.Tensor:
        return self._tensor[where]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return "F32"


def _measure(rank: int, folder: Path, save_waste: str, load_waste: str) -> tuple[int, int]:
    """Bytes that saving and loading add to what this rank holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Whatever the first call makes exists before the measurement.
    small = {"small": ShardedValue((1,), torch.float32, (Piece((0,), torch.zeros(1)),))}
    save_sharded(folder / "small", small)
    load_sharded(folder / "small", small)
    values = _values(rank, 1.0, dim=0, is_strided=True)
    max_file_bytes = 2**40 if save_waste == "share" else FILE_BYTES
    dist.barrier()
    with _holding_too_much(save_waste), PeakMemory() as saving:
        save_sharded(folder / "large", values, max_file_bytes=max_file_bytes)
    # Cut the other way: a rank reads a part of every box.
    values = _values(rank, -1.0, dim=1)
    dist.barrier()
    with _holding_too_much(load_waste), PeakMemory() as loading:
        load_sharded(folder / "large", values)
    assert all(bool((v.pieces[0].tensor == 1.0 + n).all()) for n, v in enumerate(values.values()))
    dist.destroy_process_group()
    return saving.extra_bytes, loading.extra_bytes


def test_no_rank_holds_more_than_a_piece_beside_its_share(tmp_path):
    assert SHARE_BYTES > 3 * SAVE_BOUND_BYTES
    for saving_bytes, loading_bytes in run_ranks(NUM_RANKS, _measure, tmp_path, "", ""):
        # At least the piece being written; otherwise nothing was measured.
        assert FILE_BYTES / 2 < saving_bytes <= SAVE_BOUND_BYTES
        assert loading_bytes <= LOAD_BOUND_BYTES


@pytest.mark.parametrize(("save_waste", "load_waste"), [("share", "file"), ("tensor", "file")])
def test_the_measurement_notices_a_rank_that_holds_more(tmp_path, save_waste, load_waste):
    for saving_bytes, loading_bytes in run_ranks(NUM_RANKS, _measure, tmp_path, save_waste, load_waste):
        assert saving_bytes > SAVE_BOUND_BYTES
        assert loading_bytes > LOAD_BOUND_BYTES
