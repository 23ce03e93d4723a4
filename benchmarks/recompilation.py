"""Counts compilations of FlexAttention over many packs of random length and mask.

OMP_NUM_THREADS=1 python benchmarks/recompilation.py --packs 1000
python benchmarks/recompilation.py --packs 1000 --device cuda     forward and backward
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from packs import machine, mixed_pack
from torch._dynamo.utils import counters

from bitdance_scale.model.attention import flex_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=1000)
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--max-tiles", type=int, default=20, help="longest pack, in tiles of 128 positions")
    options = parser.parse_args()
    device, has_backward = torch.device(options.device), options.device == "cuda"
    numbers = np.random.default_rng(0)
    generator = torch.Generator(device).manual_seed(0)
    print(machine())
    lengths, times, num_graphs = set(), [], []
    for index in range(options.packs):
        # At least one 16 x 16 image fits into three tiles.
        length = 128 * int(numbers.integers(3, options.max_tiles + 1))
        pack = mixed_pack(length, side=int(numbers.choice([4, 8])), seed=index)
        mask = flex_mask(pack.document_ids, pack.block_ids, device, is_compiled=True)
        heads = [torch.randn(length, 1, n, 16, device=device, generator=generator) for n in (4, 2, 2)]
        begun = time.perf_counter()
        with torch.set_grad_enabled(has_backward):
            mixed = mask.attend(*[tensor.requires_grad_(has_backward) for tensor in heads])
            if has_backward:
                mixed.sum().backward()
        times.append(time.perf_counter() - begun)
        num_graphs.append(counters["stats"]["unique_graphs"])
        lengths.add(length)
    print(
        f"{options.packs} packs of {len(lengths)} lengths up to {max(lengths)}: {num_graphs[-1]} compilation(s), "
        f"{num_graphs[0]} of them at the first pack ({times[0]:.1f} s); "
        f"median of the others {1e3 * np.median(times[1:]):.1f} ms, longest {1e3 * max(times[1:]):.0f} ms"
    )


if __name__ == "__main__":
    main()
