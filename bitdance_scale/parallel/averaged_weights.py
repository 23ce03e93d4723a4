"""Averaged weights: the exponential moving average of the float32 masters, held where the masters are.

Every rank averages the flat buffers that its optimiser steps on. The average is therefore divided among ranks as the
optimiser's state is, costs no communication, and nowhere is a whole copy. It is put in the place of the masters, and
from there into the weights, only while something is computed or written with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch


class AveragedWeights:
    """The average of some float32 buffers over the steps of a run.

    Args:
        masters: the buffers, float32, which the optimiser changes in place.
        decay: d of average <- d average + (1 - d) master, in (0, 1).

    Attributes:
        buffers: the averages, float32, one for each master; at first equal to it.
    """

    def __init__(self, masters: Sequence[torch.Tensor], decay: float) -> None:
        self._masters, self._decay = masters, decay
        self.buffers = [master.detach().clone() for master in masters]
        self._is_in_place = self._is_stale = False

    def of(self, master: torch.Tensor) -> torch.Tensor:
        """The average of one of the masters."""
        return next(average for average, other in zip(self.buffers, self._masters, strict=True) if other is master)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the masters of one more step into the average."""
        assert not self._is_in_place, "no step is taken with the average"
        for average, master in zip(self.buffers, self._masters, strict=True):
            average.lerp_(master.detach(), 1 - self._decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again with the masters as they are."""
        for average, master in zip(self.buffers, self._masters, strict=True):
            average.copy_(master)

    @contextlib.contextmanager
    def in_place_of_masters(self, refresh: Callable[[], None]) -> Iterator[None]:
        """Within it the masters hold the average and the average the masters, which come back bit for bit.

        Args:
            refresh: copies the masters into the weights, a collective; called at both ends, but not after an error:
                other ranks may not come as far. The weights are then stale.
        """
        self._exchange()
        self._is_in_place = True
        refresh()
        try:
            yield
        except BaseException:
            self._is_stale = True
            raise
        finally:
            self._exchange()
            self._is_in_place = False
        refresh()

    def refresh_stale(self, refresh: Callable[[], None]) -> None:
        """Refreshes weights that an error has left with the average; a collective then."""
        if self._is_stale:
            refresh()
            self._is_stale = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in zip(self.buffers, self._masters, strict=True):
            trained = master.detach().clone()
            master.data.copy_(average)
            average.copy_(trained)
