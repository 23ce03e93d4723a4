"""Speed of FlexAttention under the mask of a pack against causal flash attention of the same length.

    python benchmarks/attention.py                  on a GPU: bfloat16, 40 query and 8 key/value heads of 128 channels
    python benchmarks/attention.py --device cpu     only shows that the script runs: forward, tiny size

A pack has fewer visible pairs of positions than causal attention, so it prints two ratios: of times, and of the work
per second over the visible pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from packs import document_pack, machine
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitdance_scale.model.attention import flex_mask
from bitdance_scale.observe.cost import TRAINING_OVER_FORWARD, count_visible_pairs


@dataclass(frozen=True)
class Size:
    """A size to measure: samples of `document` positions in packs of `lengths`, heads and repeats."""

    document: int
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tile: int
    num_times: int


# One 64 x 64 image with its caption fills a sample of 33 tiles.
GPU = Size(4224, (16896, 33792), 40, 8, 128, torch.bfloat16, 128, 20)
CPU = Size(256, (1024,), 4, 2, 32, torch.float32, 32, 3)


def measure(run: Callable[[], object], device: torch.device, num_times: int) -> float:
    """Median time of one call in ms, after three calls to warm up."""
    times = []
    for index in range(num_times + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 3:
            times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times))


def causal_flash(heads: list[torch.Tensor]) -> torch.Tensor:
    """The baseline; heads [S, 1, N, K]."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in heads)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def compare(size: Size, length: int, side: int, device: torch.device) -> None:
    """Prints one row for the forward pass and, on a GPU, one for forward and backward together."""
    pack = document_pack(length, size.document, side)
    mask = flex_mask(pack.document_ids, pack.block_ids, device, size.tile, is_compiled=True)
    has_backward = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    heads = [
        torch.randn(length, 1, number, size.head_dim, dtype=size.dtype, device=device, generator=generator)
        for number in (size.num_heads, size.num_kv_heads, size.num_kv_heads)
    ]
    pairs = {
        "flex": count_visible_pairs(pack.document_ids, pack.block_ids),
        "flash": length * (length + 1) // 2,
    }
    forward = {"flex": lambda: mask.attend(*heads), "flash": lambda: causal_flash(heads)}

    def both(run: Callable[[], torch.Tensor]) -> None:
        mixed = run()
        torch.autograd.grad(mixed, heads, torch.ones_like(mixed))

    for name in ("forward", "forward and backward") if has_backward else ("forward",):
        is_training = name != "forward"
        for tensor in heads:
            tensor.requires_grad_(is_training)
        with torch.set_grad_enabled(is_training):
            times = {
                key: measure((lambda run=run: both(run)) if is_training else run, device, size.num_times)
                for key, run in forward.items()
            }
        # Two products of head_dim multiply-adds per pair and head.
        flops = 4 * size.num_heads * size.head_dim * (TRAINING_OVER_FORWARD if is_training else 1)
        rates = {key: 1e-9 * flops * pairs[key] / times[key] for key in times}
        print(
            f"p = {side}, {length} positions, {name}: "
            f"flex {times['flex']:.2f} ms, causal flash {times['flash']:.2f} ms; "
            f"speed {times['flash'] / times['flex']:.2f} of flash in time, "
            f"{rates['flex'] / rates['flash']:.2f} per seen pair ({rates['flex']:.3g} and {rates['flash']:.3g} TFLOP/s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)
    size = GPU if device.type == "cuda" else CPU
    print(machine())
    for side in (4, 8):
        for length in size.lengths:
            compare(size, length, side, device)


if __name__ == "__main__":
    main()
