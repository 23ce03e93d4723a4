"""Exact shares: whose turn it is at each place of an endless sequence, such as which resolution a sample is for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Apportionment:
    """An endless sequence of the numbers 0 .. K - 1 in which every prefix keeps the shares.

    Among the first T items, number k occurs more than T * share_k / sum - 1 and less than T * share_k / sum + 1 times,
    and exactly T * share_k / sum times if T is a multiple of sum / gcd. So a global batch of 2560 samples at 2:7:1
    always has 512, 1792 and 256 samples. The algorithm is Tijdeman's ("The chairman assignment problem", 1980) in
    integers: among the numbers that are due, the one with the earliest deadline comes next.

    Args:
        shares: K positive integers.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        assert shares and all(share > 0 for share in shares), shares
        divisor = math.gcd(*shares)
        self._shares = np.array([share // divisor for share in shares], dtype=np.int64)
        self.period = int(self._shares.sum())
        self._labels = self._one_period()
        is_number = self._labels[:, None] == np.arange(len(shares))
        self._counts = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(is_number, axis=0)])

    def counts_before(self, position: int) -> np.ndarray:
        """int64 [K], how often each number occurs among the first `position` items."""
        periods, rest = divmod(position, self.period)
        return periods * self._shares + self._counts[rest]

    def labels(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start], the items `start` .. `stop - 1` of the sequence."""
        return self._labels[np.arange(start, stop) % self.period]

    def _one_period(self) -> np.ndarray:
        shares = self._shares.tolist()
        if len(shares) == 1:
            return np.zeros(self.period, dtype=np.int64)
        # Deviations are measured in units of 1 / (period * slack) with slack = 2 K - 2, so that they are integers.
        slack = 2 * len(shares) - 2
        counts = [0] * len(shares)
        labels = np.empty(self.period, dtype=np.int64)
        for position in range(self.period):
            chosen, earliest = -1, math.inf
            for number, share in enumerate(shares):
                lag = slack * ((position + 1) * share - counts[number] * self.period)
                if lag < self.period:
                    continue
                deadline = ((slack - 1) * self.period - lag) / share
                if deadline < earliest:
                    chosen, earliest = number, deadline
            assert chosen >= 0, shares
            labels[position] = chosen
            counts[chosen] += 1
        return labels
