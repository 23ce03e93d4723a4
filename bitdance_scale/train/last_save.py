"""What a run does with a fault that was not foreseen: it saves what is whole, and raises."""

from __future__ import annotations

import contextlib
import datetime
import logging
import traceback
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist

from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.parallel.topology import own_store
from bitdance_scale.phases import POSITION

logger = logging.getLogger(__name__)

OTHERS_WAIT_S = 15.0
"""How long a faulted rank waits for all others to fault at the same step."""


class LocalErrors:
    """Errors of this rank in a part of the run that the step does not need, kept until all ranks can hear of them."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    @property
    def has_any(self) -> bool:
        """Whether this rank has an error that the others do not know of."""
        return bool(self._errors)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps an error of the block, so that this rank goes on to where all ranks meet."""
        try:
            yield
        except Exception as error:
            logger.error("%s: %s; the run saves and ends", type(error).__name__, error, exc_info=error)
            # What its frames hold is memory that the next step needs, most of all after an error for lack of memory.
            traceback.clear_frames(error.__traceback__)
            self._errors.append(error)

    def raise_on_all_ranks(self) -> None:
        """Raises on every rank what any has kept; a collective."""
        with all_ranks():
            if self._errors:
                raise self._errors[0]


class SavedRun(Protocol):
    """What is saved."""

    @property
    def step(self) -> int:
        """Optimiser steps taken."""

    def save(self) -> None:
        """Saves a checkpoint of the present step, unless there is one."""

    def settle(self) -> None:
        """Returns when no checkpoint is being written."""


def save_after_fault(run: SavedRun) -> None:
    """Saves a last checkpoint after an error in a step, if all ranks have one and the weights are of a whole step.

    A checkpoint needs all ranks. Where one rank fails alone, the others wait for it in a collective that cannot be
    left, and nothing is saved. Never raises: the fault itself is to be raised.
    """
    if POSITION.is_updating:
        logger.warning("no last checkpoint: the fault came while the weights were updated")
    elif run.step > 0 and _all_faulted(run.step):
        try:
            run.save()
            run.settle()
            logger.warning("saved a last checkpoint of step %d after the fault", run.step)
        except Exception as error:  # noqa: BLE001  # The fault itself is raised.
            logger.warning("no last checkpoint: %s", error)


def let_save_end(run: SavedRun) -> None:
    """Waits for a checkpoint under way before an error ends the run, whose process groups it needs. Never raises."""
    try:
        run.settle()
    except Exception as error:  # noqa: BLE001  # The error that ends the run is raised.
        logger.warning("the checkpoint under way was not committed: %s", error)


def _all_faulted(step: int) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    store, prefix = own_store(), f"bitdance/fault/{step}"
    try:
        store.set(f"{prefix}/{dist.get_rank()}", "")
        keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
        store.wait(keys, datetime.timedelta(seconds=OTHERS_WAIT_S))
    except dist.DistError as error:
        logger.warning("no last checkpoint: other ranks did not fail at this step (%s)", error)
        return False
    return True
