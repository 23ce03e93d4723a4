"""The process of a job: how it is asked to stop, and how it tells its launcher how it ended.

| exit code | meaning |
|---|---|
| 0 | complete |
| 2 | refused, or ended by something the user can mend; the message says what |
| 75 | stopped on request and saved: start it again to go on |
| 76 | a rank hung: start it again to go on from the last checkpoint |
| other | a fault of the program or the machine |
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from bitdance_scale.atomic_files import NO_ROOM_ERRNOS, is_storage_fault, write_text
from bitdance_scale.errors import BitDanceError, printable

EXIT_COMPLETE = 0
EXIT_REFUSED = 2
# EX_TEMPFAIL of sysexits.h.
EXIT_REQUEUE = 75
EXIT_HUNG = 76

EXIT_RECORD = "BITDANCE_EXIT_RECORD"
"""Environment variable with the file for the exit code; the launcher names a new one for every start."""
REFUSAL_SUFFIX = ".refusal"
"""Ends the name of the file beside it that holds the message of a refusal, or of a hang."""
STEP_SUFFIX = ".step"
"""Ends the name of the file beside it that holds the step of the newest checkpoint of this start."""
_TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FIRST_RANK_AHEAD_S = 3.0
"""How long the other ranks wait with the end of a refused job, so that the first one ends first."""
# A launcher may forward the SIGINT that the terminal has sent already: so soon, it is the same wish.
SAME_SIGINT_S = 1.0


def is_first_process() -> bool:
    """Whether this is the first rank of a torchrun job, or a process on its own."""
    return os.environ.get("RANK", "0") == "0"


def run_process(action: Callable[[], int]) -> int:
    """Runs a job in this process and returns its exit code.

    An error that the user can mend is printed on the first rank, since every rank has the same one, and handed to the
    launcher. So is the error of a file system that is full or read-only, on whichever rank it is. torchrun turns every
    code but 0 into 1 for its own caller, so the first rank of every machine writes its code into the file that
    `BITDANCE_EXIT_RECORD` names, and the message beside it. torchrun ends its report with what the rank that ended
    first has left in its error file, so every rank leaves the message there. A process that ends in any other way
    leaves no record; that is how a fault is recognised.

    Args:
        action: the job; returns its exit code.
    """
    _print_everything()
    refusal, is_own = "", False
    try:
        code = action()
    except BitDanceError as error:
        code, refusal = EXIT_REFUSED, f"{type(error).__name__}: {error}"
    except OSError as error:
        if error.errno not in NO_ROOM_ERRNOS:
            raise
        # It may be the error of this rank alone, so it does not wait for the first one to say it.
        code, refusal, is_own = EXIT_REFUSED, _no_room(error), True
    with tolerant_output():
        if refusal and (is_own or is_first_process()):
            print(f"\n{refusal}", file=sys.stderr, flush=True)
    try:
        leave_record(code, refusal, from_any=is_own)
    except OSError as error:
        if not is_storage_fault(error):
            raise
        with tolerant_output():
            print(f"the exit code cannot be left for the launcher ({error})", file=sys.stderr, flush=True)
    with tolerant_output():
        sys.stdout.flush()
    if refusal and not is_first_process() and _TORCHRUN_ERROR_FILE in os.environ:
        # torchrun ends the other ranks as soon as one has ended; the first one must have printed and recorded by then.
        time.sleep(FIRST_RANK_AHEAD_S)
    return code


def record_step(step: int) -> None:
    """Leaves the step of a committed checkpoint for the launcher, which starts its count of faults over; on one rank.

    A launcher that cannot read it only gives up sooner: a full disk is not an error here.
    """
    record = os.environ.get(EXIT_RECORD)
    if record:
        try:
            write_text(Path(record + STEP_SUFFIX), f"{step}\n", is_shared=True)
        except OSError as error:
            if not is_storage_fault(error):
                raise


def _print_everything() -> None:
    """Lets any text be printed: what the locale cannot say, such as a prompt in Chinese, is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Leaves out what a block prints to a full disk, now and at the end of the process."""
    try:
        yield
    except OSError as error:
        if not is_storage_fault(error):
            raise
        # Python flushes it once more, and would end with a code of its own.
        sys.stdout = io.StringIO()


def _no_room(error: OSError) -> str:
    """The refusal for an error of a file system that is full or read-only."""
    where = error.filename or "a file of the run folder, or of a temporary folder of this node (TMPDIR)"
    return printable(
        f"{type(error).__name__}: {where}: cannot be written ({error.strerror}): make room, raise the quota or mount "
        "it for writing, and start again; a run goes on from its newest checkpoint"
    )


def leave_record(code: int, refusal: str, *, from_any: bool = False) -> None:
    """Leaves the exit code and the message of a refusal or a hang for torchrun and for the launcher of torchrun.

    Args:
        code: the exit code.
        refusal: `NAME: MESSAGE` of an error; empty: none.
        from_any: whether every rank tells the launcher, and not only the first one of its machine.
    """
    record, error_file = os.environ.get(EXIT_RECORD), os.environ.get(_TORCHRUN_ERROR_FILE)
    if refusal and error_file:
        details = {"py_callstack": refusal, "timestamp": str(int(time.time()))}
        write_text(Path(error_file), json.dumps({"message": {"message": refusal, "extraInfo": details}}))
    is_first_of_machine = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if record and (is_first_of_machine or from_any):
        # The machines of a Slurm job name one file.
        if refusal:
            write_text(Path(record + REFUSAL_SUFFIX), refusal + "\n", is_shared=True)
        write_text(Path(record), f"{code}\n", is_shared=True)


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag while its `with` block runs; a second SIGINT kills.

    A signal may reach some ranks only, and at different steps. All ranks therefore agree after every step
    (`parallel.agreement.any_rank`), so that they stop after the same one, save, and end with `EXIT_REQUEUE`. Signals
    reach Python's main thread only, so the block must run there. torchrun forwards SIGTERM and SIGINT and kills its
    workers 30 seconds later; where a checkpoint takes longer, send SIGUSR1 to the workers themselves, ahead of time.

    Attributes:
        signal_name: name of the first signal that came to this process; None when none has.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_sigint_s: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

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
        """Whether this rank has been asked to stop."""
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
