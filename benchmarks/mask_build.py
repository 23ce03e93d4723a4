"""Time to build the block mask of a pack on one core, ours from its intervals against `create_block_mask`.

    OMP_NUM_THREADS=1 python benchmarks/mask_build.py --positions 37120

`create_block_mask` evaluates the rule on every pair of positions, which takes several GB at 37K positions;
`--baseline-positions` measures it on a shorter pack.
"""

from __future__ import annotations

import argparse
import collections
import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from packs import machine, mixed_pack
from torch.nn.attention.flex_attention import create_block_mask

from bitdance_scale.model.attention import FLEX_TILE, flex_mask
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.sequence.visibility import pack_bounds, pack_tiles

CPU = torch.device("cpu")


def measure(build: Callable[[], object], num_times: int) -> tuple[float, float]:
    """Median time on the clock and median processor time in ms; the second does not count other programs.

    The last three results stay alive, as several packs do in training.
    """
    kept: collections.deque[object] = collections.deque(maxlen=3)
    times = []
    for _ in range(num_times):
        clock, processor = time.perf_counter(), time.thread_time()
        kept.append(build())
        times.append((1e3 * (time.perf_counter() - clock), 1e3 * (time.thread_time() - processor)))
    clock, processor = np.median(times, axis=0)
    return float(clock), float(processor)


def torch_mask(pack: Pack) -> object:
    """The mask of a pack by `create_block_mask` on document and block numbers."""
    documents, blocks = torch.from_numpy(pack.document_ids), torch.from_numpy(pack.block_ids)

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (documents[query] == documents[key]) & (blocks[key] <= blocks[query])

    size = pack.num_positions
    return create_block_mask(is_seen, None, None, size, size, device="cpu", BLOCK_SIZE=FLEX_TILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=290 * FLEX_TILE, help="length of the pack")
    parser.add_argument("--baseline-positions", type=int, help="length of the pack for create_block_mask")
    parser.add_argument("--repeats", type=int, default=300, help="builds of ours")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for side in (4, 8):
        pack = mixed_pack(options.positions, side)
        bounds = pack_bounds(pack.document_ids, pack.block_ids)
        parts = {
            "intervals": functools.partial(pack_bounds, pack.document_ids, pack.block_ids),
            "tiles": functools.partial(pack_tiles, bounds, FLEX_TILE),
            "the whole mask (flex_mask)": functools.partial(flex_mask, pack.document_ids, pack.block_ids, CPU),
        }
        sizes = f"{pack.num_positions} positions, {len(pack.sample_keys)} samples, {pack.num_padding} padding"
        print(f"p = {side}: {sizes}")
        for name, build in parts.items():
            clock, ours = measure(build, options.repeats)
            print(f"  {name}: {ours:.3f} ms of processor time, {clock:.3f} ms on the clock (medians)")
        shorter = mixed_pack(options.baseline_positions or options.positions, side)
        clock, baseline = measure(functools.partial(torch_mask, shorter), 1)
        print(
            f"  create_block_mask, {shorter.num_positions} positions: {baseline:.0f} ms of processor time, "
            f"{clock:.0f} ms on the clock; {baseline / ours:.0f} times ours"
        )


if __name__ == "__main__":
    main()
