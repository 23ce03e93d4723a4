"""Saving and loading a checkpoint on two ranks against safetensors alone: speed, memory, checking of digests.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --folder FOLDER

Each rank holds half of every tensor. In the baseline each rank writes the same bytes with one `save_file` and an
fsync, or copies them into place from one `load_file`. Rounds alternate between the two; it prints medians as Markdown.
Files are in the page cache when they are read, so that the processor limits a load and not the disk.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bitdance_scale.atomic_files import sync
from bitdance_scale.checkpoint import tensor_storage
from bitdance_scale.checkpoint.sharded import load_sharded, save_sharded
from bitdance_scale.parallel.partition import Piece, ShardedValue
from tests.distributed.peak_memory import PeakMemory
from tests.distributed.spawn import run_ranks

NUM_RANKS = 2
MB = 1e6
MIB = 2**20
NUM_COLUMNS = 4096
ROWS_PER_TENSOR = 6144


def make_values(rank: int, num_layers: int) -> dict[str, ShardedValue]:
    """Per layer a bfloat16 weight and three float32 tensors of its shape, 14 bytes a parameter; a half of each here."""
    values = {}
    rows = ROWS_PER_TENSOR // NUM_RANKS
    for layer in range(num_layers):
        for kind in ("model", "master", "exp_avg", "exp_avg_sq"):
            dtype = torch.bfloat16 if kind == "model" else torch.float32
            piece = Piece((rank * rows, 0), torch.randn(rows, NUM_COLUMNS, dtype=dtype))
            values[f"{kind}.{layer}"] = ShardedValue((ROWS_PER_TENSOR, NUM_COLUMNS), dtype, (piece,))
    return values


class Clock:
    """Seconds spent inside a function while it is patched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.seconds = 0.0
        self._function = function

    def __call__(self, *args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self._function(*args)
        finally:
            self.seconds += time.perf_counter() - begun


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks are done."""
    dist.barrier()
    begun = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begun


def plain_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    sync(path)


def plain_load(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in load_file(path).items():
        tensors[name].copy_(tensor)


def measure(rank: int, folder: Path, num_layers: int, files_mib: list[int], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, of save and load, plain and under each file size; of digests; extra bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    values = make_values(rank, num_layers)
    tensors = {name: value.pieces[0].tensor for name, value in values.items()}
    found: dict[str, list[float]] = {"bytes": [sum(t.nbytes for t in tensors.values())]}

    def note(what: str, number: float) -> None:
        found.setdefault(what, []).append(number)

    for _ in range(rounds):
        plain = folder / f"plain{rank}.safetensors"
        note("plain save", timed(functools.partial(plain_save, tensors, plain)))
        note("plain load", timed(functools.partial(plain_load, tensors, plain)))
        plain.unlink()
        for file_mib in files_mib:
            target = folder / f"sharded_{file_mib}"
            save = functools.partial(save_sharded, target, values, max_file_bytes=file_mib * MIB)
            checking = Clock(tensor_storage.find_change)
            with PeakMemory() as saving:
                note(f"save {file_mib}", timed(save))
            with mock.patch.object(tensor_storage, "find_change", checking), PeakMemory() as loading:
                note(f"load {file_mib}", timed(functools.partial(load_sharded, target, values)))
            note(f"load digest {file_mib}", checking.seconds)
            note(f"save extra {file_mib}", saving.extra_bytes)
            note(f"load extra {file_mib}", loading.extra_bytes)
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)
    dist.destroy_process_group()
    return found


def measure_descriptions(rank: int, folder: Path, num_boxes: int) -> dict[str, float]:
    """A checkpoint of many tiny boxes: seconds and extra bytes are those of planning and of the index."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape = (NUM_RANKS, 16)
    values = {
        f"optimizer.exp_avg.decoder.layers.{i}.weight": ShardedValue(
            shape, torch.float32, (Piece((rank, 0), torch.zeros(1, 16)),)
        )
        for i in range(num_boxes // NUM_RANKS)
    }
    with PeakMemory() as saving:
        save_s = timed(functools.partial(save_sharded, folder / "boxes", values))
    with PeakMemory() as loading:
        load_s = timed(functools.partial(load_sharded, folder / "boxes", values))
    dist.destroy_process_group()
    return {"save_s": save_s, "save": saving.extra_bytes, "load_s": load_s, "load": loading.extra_bytes}


def print_table(ranks: list[dict[str, list[float]]], files_mib: list[int]) -> None:
    """Medians over the rounds; times end at a barrier, memory and digests are those of the worse rank."""
    total = sum(found["bytes"][0] for found in ranks)
    print(f"{total / MB:.0f} MB on {NUM_RANKS} ranks; MB/s of all ranks together\n")
    print("| | save MB/s | of plain | extra MiB | load MB/s | of plain | digests | extra MiB |")
    print("|---|---|---|---|---|---|---|---|")

    def median(what: str) -> float:
        return max(statistics.median(found[what]) for found in ranks)

    plain = {what: median(f"plain {what}") for what in ("save", "load")}
    speeds = {what: f"{total / seconds / MB:.0f}" for what, seconds in plain.items()}
    print(f"| safetensors alone | {speeds['save']} | 1 | | {speeds['load']} | 1 | | |")
    for file_mib in files_mib:
        cells = [f"files of {file_mib} MiB"]
        for what in ("save", "load"):
            seconds = median(f"{what} {file_mib}")
            extra = max(max(found[f"{what} extra {file_mib}"]) for found in ranks)
            cells += [f"{total / seconds / MB:.0f}", f"{plain[what] / seconds:.2f}"]
            cells += [f"{median(f'load digest {file_mib}') / seconds:.0%}"] if what == "load" else []
            cells += [f"{extra / MIB:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Runs both measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the file system to measure; emptied afterwards")
    parser.add_argument("--layers", type=int, default=5, help="352 MB each")
    parser.add_argument("--files-mib", type=int, nargs="+", default=[32, 64, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--boxes", type=int, default=20_000, help="of the second measurement")
    given = parser.parse_args()
    folder = given.folder / "checkpoint_benchmark"
    folder.mkdir(parents=True)
    try:
        arguments = (folder, given.layers, given.files_mib, given.rounds)
        print_table(run_ranks(NUM_RANKS, measure, *arguments, timeout_s=3600), given.files_mib)
        found = run_ranks(NUM_RANKS, measure_descriptions, folder, given.boxes, timeout_s=3600)
        print(f"\n{given.boxes} boxes, index of {(folder / 'boxes' / 'index.json').stat().st_size / MB:.1f} MB")
        for rank, numbers in enumerate(found):
            for what in ("save", "load"):
                seconds, box_bytes = numbers[f"{what}_s"], numbers[what] / given.boxes
                print(f"rank {rank}: {what} {seconds:.1f} s, {box_bytes:.0f} bytes a box")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
