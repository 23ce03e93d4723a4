"""Blocks of pinned memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitdance_scale.parallel.pinned import BLOCK_BYTES, in_blocks, pinned_bytes

MIB, GIB = 2**20, 2**30


def as_torch_takes(num_bytes: int) -> int:
    """CachingHostAllocator's rounding: the next power of two."""
    power = 1
    while power < num_bytes:
        power *= 2
    return power


@pytest.mark.parametrize(
    ("num_bytes", "taken"),
    [
        (0, 0),
        (1, 1),
        (3 * MIB, 4 * MIB),
        (GIB, GIB),
        (GIB + 1, GIB + 1),
        (9 * GIB // 2, 9 * GIB // 2),
        (8 * GIB - 1, 8 * GIB),
    ],
)
def test_only_the_last_block_is_rounded(num_bytes, taken):
    assert pinned_bytes(num_bytes) == taken


def test_boxes_of_a_large_checkpoint_waste_little():
    # Most boxes are of 128 MiB, the largest of a file.
    sizes = [size * MIB // 8 for size in np.random.default_rng(0).choice([1, 37, 300, 1024], 200).tolist()]
    places, used = in_blocks(sizes)
    assert sum(used) == sum(sizes) and max(used) <= BLOCK_BYTES
    assert sum(map(as_torch_takes, used)) <= 1.15 * sum(sizes)
    taken = sorted((block, start, start + size) for (block, start), size in zip(places, sizes, strict=True))
    assert all(before[0] < after[0] or before[2] <= after[1] for before, after in itertools.pairwise(taken))


def test_one_that_is_larger_than_a_block_has_its_own():
    assert in_blocks([5, 30, 5, 9], block_bytes=10) == ([(0, 0), (1, 0), (0, 5), (2, 0)], [10, 30, 9])
