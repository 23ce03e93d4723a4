"""Checkpoints of several ranks: any layout into any other, bit for bit, and failures that all ranks agree on."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bitdance_scale.checkpoint import tensor_storage
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import find_change
from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint, save_checkpoint
from bitdance_scale.checkpoint.sharded import load_sharded, save_sharded
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.partition import Piece, Placement, ShardedValue, fragment_pieces, whole_pieces
from tests.distributed.spawn import run_ranks

VOCAB = 10
# name -> (whole shape, split dim, stacked matrices); the vocabulary is padded to 12 rows so that 4 ranks divide it.
PARAMETERS = {
    "embedding": ((VOCAB, 3), 0, 1),
    "fc1": ((16, 5), 0, 2),
    "fc2": ((5, 8), 1, 1),
    "norm": ((7,), None, 1),
    "kernel": ((8, 2, 3), 0, 1),
}
# (tensor-parallel, data-parallel) ranks
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(1, 4), (2, 2), (4, 1)]}
STATE = TrainState(step=3, images=12, tokens=99, loader={"step": 3}, optimizer={"step": 3}, tokenizer_digest="t")


def whole_tensor(name: str, kind: str) -> torch.Tensor:
    """The values every layout must agree on; no two elements of a parameter's tensors are alike."""
    shape = PARAMETERS[name][0]
    seed = list(PARAMETERS).index(name) * 10 + ["model", "master", "exp_avg"].index(kind)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return tensor.to(torch.bfloat16) if kind == "model" else tensor


def placement_of(name: str, tp: int, tp_rank: int) -> Placement:
    shape, dim, num_chunks = PARAMETERS[name]
    if dim is None:
        return Placement.replicated(shape)
    padded = [*shape]
    padded[0] = 12 if name == "embedding" else padded[0]
    local_shape = (*padded[:dim], padded[dim] // tp, *padded[dim + 1 :])
    return Placement.split(local_shape, dim, tp_rank, tp, num_chunks, VOCAB if name == "embedding" else None)


class Holder:
    """What a rank of a tensor-parallel x ZeRO-1 layout holds: whole slices, and its part of one flat float32 group."""

    def __init__(self, tp: int, dp: int, rank: int) -> None:
        self.placements = {name: placement_of(name, tp, rank % tp) for name in PARAMETERS}
        self.slices = {n: p.local_part(whole_tensor(n, "model")) for n, p in self.placements.items()}
        self.slices = {name: tensor.clone() for name, tensor in self.slices.items()}
        self.flats: dict[str, torch.Tensor] = {}
        self.fragments: dict[str, ShardedValue] = {}
        for kind in ("master", "exp_avg"):
            parts = [p.local_part(whole_tensor(n, kind)).reshape(-1) for n, p in self.placements.items()]
            group = torch.cat(parts)
            length = -(-group.numel() // dp)
            start = rank // tp * length
            flat = self.flats[kind] = group[start : start + length].clone()
            begin = 0
            for name, part in zip(PARAMETERS, parts, strict=True):
                low, high = max(start, begin), min(start + flat.numel(), begin + part.numel())
                fragment = flat[low - start : max(high, low) - start]
                self.fragments[f"{kind}.{name}"] = fragment_pieces(fragment, low - begin, self.placements[name])
                begin += part.numel()

    def model(self) -> dict[str, ShardedValue]:
        return {name: whole_pieces(tensor, self.placements[name]) for name, tensor in self.slices.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.slices | self.flats

    def clear(self) -> None:
        for tensor in self.tensors().values():
            tensor.fill_(-1.0)
        # Padding is in no checkpoint: it stays as the model was made, zero.
        for name, placement in self.placements.items():
            self.slices[name][placement.local_part(torch.ones(placement.global_shape)) == 0] = 0.0


def start(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def load_and_save(rank: int, root: Path, sources: list[str], world_size: int, is_saved: bool) -> None:
    """Loads each source under each layout of this world size, compares every bit, then saves under each."""
    if world_size > 1:
        start(rank)
    for tp, dp in LAYOUTS[world_size]:
        for source in sources:
            holder, expected = Holder(tp, dp, rank), Holder(tp, dp, rank)
            holder.clear()
            path = CheckpointFolder(root / source, keep=1).latest()
            assert load_checkpoint(path, holder.model(), holder.fragments, tokenizer_digest="t") == STATE
            for name, tensor in expected.slices.items():
                assert torch.equal(holder.slices[name], tensor), (source, tp, dp, name)
            for name, value in expected.fragments.items():
                for found, piece in zip(holder.fragments[name].pieces, value.pieces, strict=True):
                    assert torch.equal(found.tensor, piece.tensor), (source, tp, dp, name)
        if is_saved:
            holder = Holder(tp, dp, rank)
            folder = CheckpointFolder(root / f"tp{tp}_dp{dp}", keep=1)
            save_checkpoint(folder, STATE, holder.model(), holder.fragments, config_text="")
    if world_size > 1:
        dist.destroy_process_group()


def test_every_layout_loads_every_other(tmp_path):
    load_and_save(0, tmp_path, [], 1, True)
    run_ranks(2, load_and_save, tmp_path, ["tp1_dp1"], 2, True)
    run_ranks(4, load_and_save, tmp_path, ["tp1_dp1", "tp2_dp1", "tp1_dp2"], 4, True)
    load_and_save(0, tmp_path, ["tp1_dp2", "tp1_dp4", "tp2_dp2", "tp4_dp1"], 1, False)
    # Four data-parallel replicas hold the parameters; each element is on disk once, beside 4 KB of headers at most.
    num_elements = sum(whole_tensor(name, "model").numel() for name in PARAMETERS)
    files = list((tmp_path / "tp1_dp4").rglob("*.safetensors"))
    assert len(files) == 4
    payload = num_elements * (2 + 4 + 4)
    assert payload <= sum(path.stat().st_size for path in files) <= payload + 4 * 4096


def fail_in_turn(rank: int, root: Path) -> None:
    start(rank)
    folder = CheckpointFolder(root, keep=2)
    holder = Holder(2, 1, rank)
    save_checkpoint(folder, STATE, holder.model(), holder.fragments, config_text="")
    first = folder.latest()

    with pytest.raises(CheckpointError, match="step_00000003 exists"):
        save_checkpoint(folder, STATE, holder.model(), holder.fragments, config_text="")
    with (
        pytest.raises(CheckpointError, match="step 4 was not committed: rank 1: OSError: disk full"),
        folder.write(4),
    ):
        if rank == 1:
            raise OSError("disk full")
    with (
        mock.patch.object(tensor_storage, "sync", refuse if rank == 1 else tensor_storage.sync),
        pytest.raises(CheckpointError, match="tensors not written: rank 1: OSError: .*input/output error"),
    ):
        save_checkpoint(folder, dataclasses.replace(STATE, step=5), holder.model(), holder.fragments, config_text="")
    with pytest.raises(CheckpointError, match="not seen by the first one; put the run folder on a file system"):
        # Every rank has a disk of its own.
        save_sharded(root / f"disk{rank}", holder.model())
    assert folder.latest() == first and folder.steps() == [3]

    holder.clear()
    before = {name: tensor.clone() for name, tensor in holder.tensors().items()}
    model = holder.model()
    if rank == 1:
        model["fc2"] = ShardedValue((5, 9), torch.bfloat16, (Piece((0, 0), torch.zeros(5, 9, dtype=torch.bfloat16)),))
    with pytest.raises(CheckpointError, match=r"rank 1: a checkpoint of another model .model.fc2: shape \[5, 8\]"):
        load_checkpoint(first, model, holder.fragments, tokenizer_digest="t")
    assert all(torch.equal(tensor, before[name]) for name, tensor in holder.tensors().items())
    load_sharded(first / "tensors", {f"model.{n}": v for n, v in holder.model().items()}, prefix="model.")
    dist.destroy_process_group()


def refuse(path: Path) -> None:
    raise OSError(f"{path}: input/output error")


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path):
    run_ranks(2, fail_in_turn, tmp_path)


def find_flipped_bit(rank: int, root: Path, is_damaged: bool) -> list[str]:
    """Loads a checkpoint that may be damaged; the files this rank hashed."""
    start(rank)
    holder, hashed = Holder(1, 2, rank), []
    holder.clear()
    before = {name: tensor.clone() for name, tensor in holder.tensors().items()}

    def record(path: Path, *written: object) -> str | None:
        hashed.append(path.name)
        return find_change(path, *written)

    with mock.patch.object(tensor_storage, "find_change", record):
        path = CheckpointFolder(root, keep=1).latest()
        if is_damaged:
            # All ranks raise what only one of them has seen, and none has written to a tensor.
            with pytest.raises(CheckpointError, match=r"not loaded: rank \d: .*rank00003_000.safetensors is damaged"):
                load_checkpoint(path, holder.model(), holder.fragments, tokenizer_digest="t")
            assert all(torch.equal(tensor, before[name]) for name, tensor in holder.tensors().items())
        else:
            load_checkpoint(path, holder.model(), holder.fragments, tokenizer_digest="t")
    dist.destroy_process_group()
    return hashed


def test_ranks_share_out_the_files_to_hash_and_agree_on_damage(tmp_path):
    load_and_save(0, tmp_path, [], 1, True)
    run_ranks(4, load_and_save, tmp_path, ["tp1_dp1"], 4, True)
    root = tmp_path / "tp2_dp2"
    shares = run_ranks(2, find_flipped_bit, root, False)
    assert sorted(shares[0] + shares[1]) == [f"rank{rank:05d}_000.safetensors" for rank in range(4)]
    assert len(shares[0]) == len(shares[1])
    file = root / "step_00000003" / "tensors" / "rank00003_000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run_ranks(2, find_flipped_bit, root, True)


def die_inside(rank: int, root: Path, where: str) -> None:
    start(rank)

    def before(action: str) -> None:
        if action == where:
            os.kill(os.getpid(), signal.SIGKILL)

    holder = Holder(1, 2, rank)
    folder = CheckpointFolder(root, keep=1, before=before)
    for tensor in holder.tensors().values():
        tensor.zero_()
    save_checkpoint(folder, TrainState(4, 16, 120, {}, {}, "t"), holder.model(), holder.fragments, config_text="")


def test_a_job_killed_inside_a_save_resumes_from_the_one_before(tmp_path):
    load_and_save(0, tmp_path, [], 1, True)
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(2, die_inside, tmp_path / "tp1_dp1", "rename")
    assert (tmp_path / "tp1_dp1" / "step_00000004.writing").is_dir()
    load_and_save(0, tmp_path, ["tp1_dp1"], 1, False)
