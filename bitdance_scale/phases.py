"""What this rank is doing in its run: the one place where the parts of a step are named.

The code of a part runs inside `phase(...)`. The heartbeat (`train/heartbeat.py`) reads from here how far a rank is;
the profiler and the metrics listen. Phases nest: in a schedule of forward and backward passes, the inner one counts.
Only the main thread, which runs the steps, enters phases.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """A part of a run."""

    STARTING = "starting"
    READING = "reading"
    ENCODING = "encoding"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMISER = "optimiser"
    LOGGING = "logging"
    SAVING = "saving"
    EVALUATING = "evaluating"
    DRAWING = "drawing"
    ENDING = "ending"


LONG_PHASES = frozenset({Phase.STARTING, Phase.SAVING, Phase.EVALUATING, Phase.DRAWING, Phase.ENDING})
"""Phases that may take much longer than a part of a step, on one rank while the others wait."""

Listener = Callable[[Phase], AbstractContextManager[object]]
"""Opens what lasts as long as a phase, such as a range of a profiler."""


@dataclass
class Position:
    """How far this rank is.

    Attributes:
        step: optimiser steps taken.
        phase: what it does now.
        changes: how often the phase or the step has changed; a rank that gets on counts up.
        since_s: `time.monotonic()` of the last change.
        is_updating: whether the weights may be between two steps: from the start of the optimiser's work to the end of
            the step.
    """

    step: int = 0
    phase: Phase = Phase.STARTING
    changes: int = 0
    since_s: float = 0.0
    is_updating: bool = False

    def move(self, phase: Phase, step: int | None = None) -> None:
        """Goes to another phase, and to another step where one is given."""
        self.phase, self.since_s = phase, time.monotonic()
        if step is not None:
            self.step = step
        self.changes += 1


POSITION = Position()
"""Of this process."""
_listeners: list[Listener] = []


@contextlib.contextmanager
def phase(kind: Phase) -> Iterator[None]:
    """The block is this part of the run; at its end the surrounding part goes on."""
    outer = POSITION.phase
    POSITION.is_updating |= kind is Phase.OPTIMISER
    POSITION.move(kind)
    try:
        with contextlib.ExitStack() as opened:
            for listener in _listeners:
                opened.enter_context(listener(kind))
            yield
    finally:
        POSITION.move(outer)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Phases that begin within the block are told to the listener."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
