"""A drawing that can be watched and stopped: its pictures as they grow, block by block."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitdance_scale.app.settings import DrawSettings
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.generate.drawer import Drawer
from bitdance_scale.generate.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_PREVIEWS = 12
"""Most decodes of an unfinished picture: each costs as much as that of the finished one."""
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Progress:
    """How far a drawing is.

    Attributes:
        num_ahead: drawings of others that come first; 0: it is under way.
        num_drawn: blocks of each picture that are drawn.
        num_blocks: of each picture.
        seconds: since it began.
        images: uint8 [H, W, 3] each, of what is drawn; empty: no newer than before.
        is_finished: whether these are the finished pictures.
    """

    num_ahead: int = 0
    num_drawn: int = 0
    num_blocks: int = 0
    seconds: float = 0.0
    images: Sequence[np.ndarray] = ()
    is_finished: bool = False


class _StoppedError(Exception):
    """Somebody wants no more of it."""


class _Turns:
    """Whose turn it is: first come, first served."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextlib.contextmanager
    def turn(self, stop: threading.Event, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Waits for a turn and has it while the block runs.

        Args:
            stop: set by whoever no longer waits.
            on_wait: called with the number of turns before, whenever it has changed.
        """
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        try:
            num_ahead = 0
            with self._changed:
                while self._line[0] is not ticket:
                    if stop.is_set():
                        raise _StoppedError
                    if self._line.index(ticket) != num_ahead:
                        num_ahead = self._line.index(ticket)
                        on_wait(num_ahead)
                    self._changed.wait(_LOOK_EVERY_S)
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()


_Events = queue.SimpleQueue[Progress | Exception | None]


class Studio:
    """A model that draws one drawing at a time, whoever asks.

    Args:
        drawer: the model.
        max_previews: most previews of a picture.
    """

    def __init__(self, drawer: Drawer, max_previews: int = MAX_PREVIEWS) -> None:
        self.drawer, self._max_previews = drawer, max_previews
        self._turns = _Turns()

    def draw(self, settings: DrawSettings, stop: threading.Event) -> Iterator[Progress]:
        """Draws pictures in a thread of its own, when those who asked before have theirs.

        What comes last is finished, unless it was stopped. Of blocks without a preview, only the newest is told to who
        looks seldom. Leaving off asks to stop.

        Args:
            settings: what and how.
            stop: set by whoever wants no more; the drawing ends after the block.

        Raises:
            BitDanceError: the model cannot draw so, or the device has too little memory.
        """
        events: _Events = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._turns.turn(stop, lambda num_ahead: events.put(Progress(num_ahead=num_ahead))):
                    self._work(settings, stop, events)
            except _StoppedError:
                pass
            except Exception as error:  # noqa: BLE001  # it is raised where the drawing is watched
                events.put(error)
            events.put(None)

        threading.Thread(target=work, name="drawing", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise _in_plain_words(event, settings) from event
                if event.images or events.empty():
                    yield event
        finally:
            stop.set()

    def _work(self, settings: DrawSettings, stop: threading.Event, events: _Events) -> None:
        vision, begun_s = self.drawer.vision, time.perf_counter()
        section = vision.section
        grid = settings.height // section.downsample, settings.width // section.downsample
        num_blocks = grid[0] * grid[1] // section.block_tokens
        previewed = preview_blocks(num_blocks, self._max_previews)

        def look(blocks: Sequence[torch.Tensor]) -> None:
            if stop.is_set():
                raise _StoppedError
            images: Sequence[np.ndarray] = ()
            if len(blocks) in previewed:
                images = [vision.decode_first(bits, grid).numpy() for bits in torch.cat(list(blocks), dim=1)]
            events.put(Progress(0, len(blocks), num_blocks, time.perf_counter() - begun_s, images))

        if stop.is_set():
            raise _StoppedError
        drawn = self.drawer.draw(settings.batch(self.drawer.facts), look)
        images = [vision.decode(bits, grid).numpy() for bits in drawn]
        events.put(Progress(0, num_blocks, num_blocks, time.perf_counter() - begun_s, images, is_finished=True))


def preview_blocks(num_blocks: int, most: int) -> frozenset[int]:
    """After how many blocks a preview is decoded: evenly spread, at most so often, and not after the last block."""
    count = min(most, num_blocks - 1)
    return frozenset(round(number * num_blocks / (count + 1)) for number in range(1, count + 1))


def _in_plain_words(error: Exception, settings: DrawSettings) -> Exception:
    if isinstance(error, BitDanceError):
        return error
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        fewer = "fewer images or " if settings.images > 1 else ""
        return ConfigError(
            f"Images = {settings.images} of {settings.height} x {settings.width} px: need more memory than the device "
            f"has; take {fewer}a smaller size"
        )
    logger.error("a drawing failed", exc_info=error)
    return error
