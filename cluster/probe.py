"""One process of a timed all-reduce; the pre-flight starts one per GPU.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, PROBE_TIMEOUT_S and PROBE_RESULT come from the environment. The
process with LOCAL_RANK 0 writes the bus bandwidth in GB/s into the file that PROBE_RESULT names: the load of each link,
which is comparable between numbers of ranks (nccl-tests, PERFORMANCE.md). What it prints is for the node's log, where
NCCL prints too.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

NUM_WARMUP = 2
NUM_TIMED = 5
# The size of a bucket of gradients on a GPU; on a CPU it only has to work.
GPU_BYTES = 256 * 2**20
CPU_BYTES = 4 * 2**20


def bus_gbs(num_bytes: int, num_ranks: int, seconds: float) -> float:
    """Bus bandwidth in GB/s of an all-reduce of `num_bytes`; every link carries 2 (n - 1) / n of them."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds / 1e9


def main() -> int:
    """Times the all-reduce; returns 1 if its sum is wrong, else 0."""
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=float(os.environ["PROBE_TIMEOUT_S"]))
    dist.init_process_group("nccl" if has_cuda else "gloo", timeout=timeout)
    num_bytes = GPU_BYTES if has_cuda else CPU_BYTES
    values = torch.ones(num_bytes // 4, device=device)
    for _ in range(NUM_WARMUP):
        dist.all_reduce(values)
    is_right = bool((values == float(dist.get_world_size() ** NUM_WARMUP)).all())
    _synchronise(device)
    begun_s = time.perf_counter()
    for _ in range(NUM_TIMED):
        dist.all_reduce(values)
    _synchronise(device)
    seconds = (time.perf_counter() - begun_s) / NUM_TIMED
    if os.environ["LOCAL_RANK"] == "0":
        gbs = bus_gbs(num_bytes, dist.get_world_size(), seconds)
        Path(os.environ["PROBE_RESULT"]).write_text(f"{gbs:.3f}\n", encoding="utf-8")
    dist.destroy_process_group()
    if not is_right:
        print("the sum of the all-reduce is wrong", file=sys.stderr, flush=True)
    return 0 if is_right else 1


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
