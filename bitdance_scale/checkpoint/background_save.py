"""Checkpoints that are written while training goes on.

The main thread copies what this rank writes (`staging.py`) and returns. One thread then runs the whole protocol of a
save, up to the commit, over a process group of its own: a group must not be used by two threads at once. A crash during
a save in the background leaves what a crash during any save leaves: the earlier checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import StepState, save_checkpoint
from bitdance_scale.checkpoint.staging import Stager
from bitdance_scale.parallel.partition import ShardedValue

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves the checkpoints of a run, in the background or not. All ranks call it alike, from their main threads.

    Args:
        folder: the checkpoints; its group is used by nothing else.
        device: of the values.
        is_background: whether `save` returns before the checkpoint is written.
        committed: called with the folder of every checkpoint once it is committed, on every rank, in the thread that
            wrote it.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        device: torch.device,
        *,
        is_background: bool,
        committed: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self._folder, self._is_background, self._committed = folder, is_background, committed
        self._stager = Stager(folder.group, device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._begun_s = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has ended with an error, as far as this rank knows; `wait` raises it."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(
        self,
        state: StepState,
        model: Mapping[str, ShardedValue],
        optimizer: Mapping[str, ShardedValue],
        config_text: str,
    ) -> None:
        """Saves a checkpoint, the arguments as of `save_checkpoint`; waits for the one before it first.

        Raises:
            CheckpointError: on every rank: the one before it was not committed; in the foreground, or this one.
        """
        self.wait()
        self._begun_s = time.monotonic()
        if not self._is_background:
            self._write(state, model, optimizer, config_text)
            return
        # One room for both; the names cannot meet.
        staged = self._stager.stage(_joined(model, optimizer))
        copies = _parted(staged)
        logger.info(
            "checkpoint of step %d copied in %.2f s; it is written in the background",
            state.step,
            time.monotonic() - self._begun_s,
        )
        self._pending = self._thread.submit(self._write, state, *copies, config_text)

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            CheckpointError: on every rank: it was not committed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread; a save under way is finished first."""
        self._thread.shutdown(wait=True)

    def _write(
        self,
        state: StepState,
        model: Mapping[str, ShardedValue],
        optimizer: Mapping[str, ShardedValue],
        config_text: str,
    ) -> None:
        self._stager.wait()
        try:
            path = save_checkpoint(self._folder, state, model, optimizer, config_text)
        except Exception as error:
            if self._is_background:
                # All ranks raise it, but only when they next look.
                logger.warning("the checkpoint of step %d failed: %s", state.step, error)
            raise
        logger.info("checkpoint of step %d written in %.1f s", state.step, time.monotonic() - self._begun_s)
        self._committed(path)


def _joined(model: Mapping[str, ShardedValue], optimizer: Mapping[str, ShardedValue]) -> dict[str, ShardedValue]:
    return {f"m.{name}": value for name, value in model.items()} | {
        f"o.{name}": value for name, value in optimizer.items()
    }


def _parted(values: Mapping[str, ShardedValue]) -> tuple[dict[str, ShardedValue], dict[str, ShardedValue]]:
    model = {name[2:]: value for name, value in values.items() if name.startswith("m.")}
    return model, {name[2:]: value for name, value in values.items() if name.startswith("o.")}
