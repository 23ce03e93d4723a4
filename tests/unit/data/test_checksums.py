"""The checksum of data: the published function, and what it notices."""

from __future__ import annotations

import numpy as np
import pytest

from bitdance_scale.data.checksums import checksum32


@pytest.mark.parametrize(
    ("data", "xxh3_64"),
    [
        # The published digests of XXH3-64 with seed 0, of nothing and of "a", "abc".
        (b"", 0x2D06800538D394C2),
        (b"a", 0xE6C632B61E964E1F),
        (b"abc", 0x78AF5F94892F3950),
    ],
)
def test_it_is_the_low_half_of_xxh3(data: bytes, xxh3_64: int) -> None:
    assert checksum32(data) == xxh3_64 % 2**32
    assert checksum32(memoryview(b"." + data)[1:]) == checksum32(data)


def test_every_flipped_bit_shows() -> None:
    """On 1 KiB, the bits of an image of 256 px: no two of the 8192 damaged versions and the whole one agree with it."""
    data = bytearray(np.random.default_rng(0).bytes(1024))
    whole = checksum32(bytes(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum32(bytes(data)) != whole
        data[bit // 8] ^= 1 << bit % 8
