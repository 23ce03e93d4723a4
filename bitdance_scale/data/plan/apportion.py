"""Exact shares: how many samples of each class stand among the first T of the training order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Apportionment:
    """An endless sequence of class numbers that keeps the shares at every prefix.

    After any T items, class c has had more than T * share_c / sum - 1 and less than T * share_c / sum + 1 of them, and
    exactly its share after every multiple of sum / gcd items. So a global batch of 2560 at 2:7:1 holds 512, 1792 and
    256 of the resolutions, always. The sequence is Tijdeman's ("The chairman assignment problem", 1980), in integers: among
    the resolutions whose quota is due, the one with the earliest deadline comes next.

    Args:
        shares: positive integers.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        assert shares and all(share > 0 for share in shares), shares
        divisor = math.gcd(*shares)
        self._shares = np.array([share // divisor for share in shares], dtype=np.int64)
        self.period = int(self._shares.sum())
        self._labels = self._one_period()
        is_class = self._labels[:, None] == np.arange(len(shares))
        self._counts = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(is_class, axis=0)])

    def counts_before(self, position: int) -> np.ndarray:
        """int64 [K], items of each class among the first `position`."""
        periods, rest = divmod(position, self.period)
        return periods * self._shares + self._counts[rest]

    def labels(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start], class of the items number `start` to `stop`."""
        return self._labels[np.arange(start, stop) % self.period]

    def _one_period(self) -> np.ndarray:
        shares = self._shares.tolist()
        if len(shares) == 1:
            return np.zeros(self.period, dtype=np.int64)
        # Deviations are measured in units of 1 / (period * slack) with slack = 2 K - 2, so that all stays integral.
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
