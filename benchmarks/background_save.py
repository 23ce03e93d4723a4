"""How long a checkpoint stalls training: ours in the background against torch.distributed.checkpoint.async_save.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/background_save.py --folder FOLDER

Two ranks hold halves of the same tensors, weights in bfloat16 with float32 masters and moments. In every round both
save them, in turn, while the main thread multiplies matrices as training would. The stall is the time until the call
returns on the slower rank; the whole is the time until everything is on storage and, in ours, committed. It prints
medians as Markdown. torch's writer has no digests, no commit protocol and no fsync by default; it gets the fsync here.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, async_save

from benchmarks.checkpoint import MB, NUM_RANKS, make_values
from bitdance_scale.checkpoint.background_save import CheckpointSaver
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import StepState
from bitdance_scale.parallel.topology import make_host_group
from tests.distributed.spawn import run_ranks


def measured(begin: Callable[[], Callable[[], Any]]) -> tuple[float, float, int]:
    """(seconds of the call on the slower rank, seconds until all is written, matrix products meanwhile)."""
    dist.barrier()
    begun_s = time.perf_counter()
    is_done = begin()
    stall = torch.tensor([time.perf_counter() - begun_s], dtype=torch.float64)
    num_products, matrix = 0, torch.randn(256, 256)
    while not is_done():
        matrix = torch.tanh(matrix @ matrix)
        num_products += 1
    dist.barrier()
    dist.all_reduce(stall, op=dist.ReduceOp.MAX)
    return stall.item(), time.perf_counter() - begun_s, num_products


def measure(rank: int, folder: Path, num_layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    values = make_values(rank, num_layers)
    tensors = {f"{name}.{rank}": value.pieces[0].tensor for name, value in values.items()}
    theirs = make_host_group()
    saver = CheckpointSaver(
        CheckpointFolder(folder / "ours", keep=1, group=make_host_group()), torch.device("cpu"), is_background=True
    )
    found: dict[str, list[float]] = {"bytes": [sum(t.nbytes for t in tensors.values())]}

    def begin_ours(step: int) -> Callable[[], bool]:
        saver.save(StepState(step), values, {}, "")
        return lambda: saver._pending is not None and saver._pending.done()

    def begin_theirs(step: int) -> Callable[[], bool]:
        path = folder / f"theirs_{step}"
        future = async_save(tensors, storage_writer=FileSystemWriter(path, sync_files=True), process_group=theirs)
        assert not isinstance(future, dict)
        return future.done  # type: ignore[union-attr]

    for step in range(1, rounds + 1):
        for name, begin in (("theirs", begin_theirs), ("ours", begin_ours)):
            numbers = measured(lambda begin=begin, step=step: begin(step))  # type: ignore[misc]
            for what, number in zip(("stall", "whole", "products"), numbers, strict=True):
                found.setdefault(f"{name} {what}", []).append(number)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / f"theirs_{step}")
    saver.close()
    dist.destroy_process_group()
    return found


def main() -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the file system to measure; emptied afterwards")
    parser.add_argument("--layers", type=int, default=1, help="352 MB each")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    folder = given.folder / "background_save_benchmark"
    folder.mkdir(parents=True)
    try:
        ranks = run_ranks(NUM_RANKS, measure, folder, given.layers, given.rounds, timeout_s=1800)
    finally:
        shutil.rmtree(folder)
    total = sum(found["bytes"][0] for found in ranks)
    print(f"{total / MB:.0f} MB on {NUM_RANKS} ranks, {given.rounds} rounds\n")
    print("| | first stall, s | median stall, s | of async_save | whole, s | of async_save |")
    print("|---|---|---|---|---|---|")
    medians = {name: statistics.median(numbers) for name, numbers in ranks[0].items()}
    for name, title in (("theirs", "async_save"), ("ours", "in the background")):
        cells = [f"{ranks[0][f'{name} stall'][0]:.3f}"]
        for what in ("stall", "whole"):
            cells += [
                f"{medians[f'{name} {what}']:.3f}",
                f"{medians[f'{name} {what}'] / medians[f'theirs {what}']:.2f}",
            ]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
