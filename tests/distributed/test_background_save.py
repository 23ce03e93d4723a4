"""Checkpoints that are written while training changes the weights: what is saved, what a full disk does, who hears."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bitdance_scale.checkpoint import tensor_storage
from bitdance_scale.checkpoint.background_save import CheckpointSaver
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import load_checkpoint
from bitdance_scale.errors import CheckpointError, DiskFullError
from bitdance_scale.parallel.topology import make_host_group
from tests.distributed.spawn import run_ranks
from tests.distributed.test_sharded_checkpoint import PARAMETERS, STATE, Holder, start, whole_tensor

CPU = torch.device("cpu")


def at(step: int):
    return dataclasses.replace(STATE, step=step)


def _save_while_training(rank: int, root: Path, tp: int, dp: int) -> None:
    start(rank)
    may_write = threading.Event()
    holder = Holder(tp, dp, rank)
    committed: list[Path] = []

    def before(action: str) -> None:
        # On the first rank, before anything is written; the other ranks wait for it.
        assert may_write.wait(60), action

    folder = CheckpointFolder(root, keep=2, group=make_host_group(), before=before)
    saver = CheckpointSaver(folder, CPU, is_background=True, committed=committed.append)
    saver.save(at(3), holder.model(), holder.fragments, "")
    # Every element is copied by one rank: the copies of all ranks are one checkpoint.
    sizes = torch.tensor([saver._stager.num_bytes])
    dist.all_reduce(sizes)
    payload = sum(whole_tensor(name, "model").numel() * (2 + 4 + 4) for name in PARAMETERS)
    assert sizes.item() == payload
    holder.clear()
    # Training goes on in the default group while the thread saves in its own.
    dist.all_reduce(torch.ones(1))
    assert not saver.has_failed and not committed and folder.steps() == []
    may_write.set()
    saver.wait()
    assert committed == [root / "step_00000003"]

    fresh, expected = Holder(tp, dp, rank), Holder(tp, dp, rank)
    fresh.clear()
    assert load_checkpoint(folder.latest(), fresh.model(), fresh.fragments, tokenizer_digest="t") == STATE
    for name, tensor in expected.slices.items():
        assert torch.equal(fresh.slices[name], tensor), name
    for name, value in expected.fragments.items():
        for found, piece in zip(fresh.fragments[name].pieces, value.pieces, strict=True):
            assert torch.equal(found.tensor, piece.tensor), name

    memory = saver._stager._places[0].room.data_ptr()
    saver.save(at(4), holder.model(), holder.fragments, "")
    saver.save(at(5), holder.model(), holder.fragments, "")
    saver.wait()
    saver.close()
    assert saver._stager._places[0].room.data_ptr() == memory and folder.steps() == [4, 5]
    dist.destroy_process_group()


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path, tp, dp):
    run_ranks(2, _save_while_training, tmp_path, tp, dp)


def _fill_the_disk(rank: int, root: Path) -> None:
    start(rank)
    holder = Holder(1, 2, rank)
    folder = CheckpointFolder(root, keep=2, group=make_host_group())
    saver = CheckpointSaver(folder, CPU, is_background=True)
    for step in (1, 2):
        saver.save(at(step), holder.model(), holder.fragments, "")
    saver.wait()
    num_full, sync = 1, tensor_storage.sync

    def full(path: Path) -> None:
        nonlocal num_full
        num_full -= 1
        if num_full >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with mock.patch.object(tensor_storage, "sync", full if rank == 1 else sync):
        saver.save(at(3), holder.model(), holder.fragments, "")
        saver.wait()
    # What the commit would have deleted went first.
    assert folder.steps() == [2, 3]

    num_full = 10
    with mock.patch.object(tensor_storage, "sync", full if rank == 1 else sync):
        saver.save(at(4), holder.model(), holder.fragments, "")
        with pytest.raises(DiskFullError, match="step 4 was not committed.*rank 1: .*No space left on device"):
            saver.wait()
    dist.barrier()
    assert folder.steps() == [3], "the last one stays, and room was made for another"
    assert [path.name for path in root.iterdir() if path.name.endswith(".writing")] == []
    dist.barrier()  # the first rank makes the next folder only after all have looked
    saver.save(at(5), holder.model(), holder.fragments, "")
    saver.wait()

    usage = mock.Mock(return_value=mock.Mock(free=100))
    with mock.patch("bitdance_scale.checkpoint.checkpoint_folder.shutil.disk_usage", usage):
        saver.save(at(6), holder.model(), holder.fragments, "")
        with pytest.raises(DiskFullError, match=r"0.00 GB are free and a checkpoint has 0.00 GB; make room"):
            saver.wait()
    assert folder.steps() == [5] and folder.latest() == root / "step_00000005"
    with mock.patch.object(tensor_storage, "sync", side_effect=RuntimeError("odd")):
        saver.save(at(7), holder.model(), holder.fragments, "")
        with pytest.raises(CheckpointError, match="RuntimeError: odd"):
            saver.wait()
    saver.close()
    dist.destroy_process_group()


def test_a_full_disk_is_tried_again_and_said_on_all_ranks(tmp_path):
    run_ranks(2, _fill_the_disk, tmp_path)
