"""Pinned host memory, which PyTorch takes in powers of two: one allocation of 4.5 GiB would hold 8."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_BYTES = 2**30
"""Bytes of an allocation of pinned memory. A power of two, so that all but the last take what they hold."""


def pinned_bytes(num_bytes: int) -> int:
    """Host memory that blocks with so many bytes take.

    Source: PyTorch's CachingHostAllocator, which rounds every allocation up to a power of two.
    """
    num_full, rest = divmod(num_bytes, BLOCK_BYTES)
    return num_full * BLOCK_BYTES + (1 << (rest - 1).bit_length() if rest else 0)


def in_blocks(sizes: Sequence[int], block_bytes: int = BLOCK_BYTES) -> tuple[list[tuple[int, int]], list[int]]:
    """Puts each of some sizes into the first block that has room for it; one that is larger gets a block of its own.

    Args:
        sizes: in bytes.
        block_bytes: what a block has.

    Returns:
        The block and the first byte in it of each size; and the bytes of each block that are used.
    """
    places: list[tuple[int, int]] = []
    used: list[int] = []
    for size in sizes:
        block = next((number for number, start in enumerate(used) if start + size <= block_bytes), len(used))
        if block == len(used):
            used.append(0)
        places.append((block, used[block]))
        used[block] += size
    return places, used
