"""Stopping a run from outside: a signal becomes a request that all ranks act on after the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

# Exit code of a run that has saved and wants to be started again (EX_TEMPFAIL of sysexits.h).
EXIT_REQUEUE = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher may forward the SIGINT that the terminal has sent already: so soon, it is the same wish.
SAME_SIGINT_S = 1.0


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag while its `with` block runs; a second SIGINT kills.

    A signal may reach some ranks only, and at different steps; all agree after every step, so that all
    ranks stop after the same one, save, and leave with `EXIT_REQUEUE`. Signals reach Python's main thread only, so the
    block must run there. torchrun forwards SIGTERM and SIGINT and kills its workers 30 seconds later; where a
    checkpoint takes longer, send SIGUSR1 to the workers themselves, ahead of time.

    Attributes:
        signal_name: name of the first signal that came to this process; None when none has.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_sigint_s: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_requested(self) -> bool:
        """Whether this rank has been asked to stop; all ranks must agree (`parallel/agreement.any_rank`)."""
        return self.signal_name is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_second_sigint():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        # Nothing is printed here: the signal may have come in the middle of another print.
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name

    def _is_second_sigint(self) -> bool:
        now_s = time.monotonic()
        if self._first_sigint_s is None:
            self._first_sigint_s = now_s
            return False
        return now_s - self._first_sigint_s > SAME_SIGINT_S
