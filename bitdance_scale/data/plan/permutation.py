"""Order and randomness as functions of a key: a permutation in constant memory, and uniform draws.

Both use 64-bit integer arithmetic only, so every machine, rank and thread computes the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NUM_ROUNDS = 6
_MASK64 = (1 << 64) - 1
# 2^64 divided by the golden ratio, the increment of SplitMix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 that maps neighbours far apart.

    Source: Steele et al., "Fast splittable pseudorandom number generators", 2014.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fold_key(key: Sequence[int]) -> np.ndarray:
    """uint64 [1], a key of any number of integers of any size, folded into one word."""
    state = np.zeros(1, dtype=np.uint64)
    for part in (len(key), *key):
        state = mix((state + _GOLDEN) ^ mix(np.array([part & _MASK64], dtype=np.uint64)))
    return state


def keyed_hash(folded_key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint64 [n], a hash of each of the non-negative integers `values` [n] under a key from `fold_key`."""
    return mix(mix(values.astype(np.uint64) + _GOLDEN) ^ folded_key)


def uniform(key: Sequence[int], values: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1), one draw for each of the non-negative integers `values` [n] under a key."""
    return (keyed_hash(fold_key(key), values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A keyed bijection of 0 .. size - 1 that stores nothing.

    It is a balanced Feistel network over an even number of bits, applied until the value is below `size` (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Its domain is at most four times `size`.

    Args:
        size: number of items, 1 <= size <= 2^62.
        key: integers that select the permutation.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        assert 1 <= size <= 1 << 62, size
        self._size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = [fold_key((*key, number)) for number in range(_NUM_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n], the items at `positions` [n], 0 <= position < size."""
        values = self._encrypt(positions.astype(np.uint64))
        while (is_outside := values >= self._size).any():
            values[is_outside] = self._encrypt(values[is_outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (keyed_hash(round_key, right) & self._half_mask)
        return (left << self._half_bits) | right
