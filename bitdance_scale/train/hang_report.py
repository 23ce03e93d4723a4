"""Who hung a job: what every rank last said of itself, which one the others wait for, and its stacks.

`heartbeat.py` notices a hang and calls this. A process that is stopped or stuck inside a library cannot write its own
stacks: a rank on the same machine makes it write them with SIGUSR2 and copies them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.phases import POSITION, Phase

HANGS_DIR = "hangs"
STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of its threads, also where it is stuck inside a library."""
_STACKS_WAIT_S = 5.0
_STACKS_POLL_S = 0.5
# Files of the calls that wait for other ranks, and how many frames from the innermost they are looked for in.
_COLLECTIVES = ("distributed_c10d.py", "c10d_logger.py", "p2p_communication.py")
_NUM_INNER_FRAMES = 12


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every few seconds.

    Attributes:
        rank: its number.
        node: name of its machine.
        machine: identifies the machine and its process ids; ranks with the same one can signal each other.
        pid: its process.
        stacks: number of the open file into which `STACKS_SIGNAL` makes it write.
        count: beats so far.
        step: optimiser steps taken.
        phase: a `Phase`.
        changes: how often its phase has changed.
        still_s: seconds since then.
        is_first_step: whether it has not taken a step since its start.
        is_waiting: whether its main thread waits for other ranks.
    """

    rank: int
    node: str
    machine: str
    pid: int
    stacks: int
    count: int
    step: int
    phase: str
    changes: int
    still_s: float
    is_first_step: bool
    is_waiting: bool

    def to_json(self) -> str:
        """The beat as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Beat:
        """Reads `to_json`."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """Rank, machine and process, for messages."""
        return f"rank {self.rank} (node {self.node}, process {self.pid})"

    @property
    def place(self) -> str:
        """Step and phase, for messages."""
        return f"step {self.step + 1}, {Phase(self.phase)}"


@dataclass(frozen=True)
class Verdict:
    """Which ranks hung a job.

    Attributes:
        message: for the console.
        culprits: the ranks that the others wait for.
    """

    message: str
    culprits: tuple[Beat, ...]


def machine_id() -> str:
    """The same for two processes that can signal each other by their numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text(encoding="utf-8").strip() if boot.exists() else socket.gethostname()
    try:
        return f"{booted}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return booted


def is_main_thread_waiting() -> bool:
    """Whether the main thread is inside a call that waits for other ranks."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    for _ in range(_NUM_INNER_FRAMES):
        if frame is None:
            return False
        file = frame.f_code.co_filename
        if file.endswith(_COLLECTIVES) or "deepspeed/comm/" in file:
            return True
        frame = frame.f_back
    return False


def own_beat(rank: int, stacks: int, count: int, first_step: int) -> Beat:
    """What this process says of itself now."""
    return Beat(
        rank=rank,
        node=socket.gethostname(),
        machine=machine_id(),
        pid=os.getpid(),
        stacks=stacks,
        count=count,
        step=POSITION.step,
        phase=str(POSITION.phase),
        changes=POSITION.changes,
        still_s=time.monotonic() - POSITION.since_s,
        is_first_step=POSITION.step == first_step,
        is_waiting=is_main_thread_waiting(),
    )


def find_culprits(answers: Sequence[Beat], silent: Sequence[Beat], missing: Sequence[int], folder: Path) -> Verdict:
    """Names the ranks that the others wait for.

    A rank that does not answer is one. If all answer, it is those whose main thread does not wait for other ranks; if
    all wait, those that are the least far.

    Args:
        answers: of the ranks that answered, none empty together with `silent`.
        silent: the last beats of the ranks that did not.
        missing: ranks that never beat.
        folder: where the stacks are.
    """
    if silent or missing:
        culprits, what = tuple(silent), "does not answer"
    else:
        at_work = [beat for beat in answers if not beat.is_waiting]
        least = min((beat.step, beat.changes) for beat in answers)
        culprits = tuple(at_work or [beat for beat in answers if (beat.step, beat.changes) == least])
        what = "does not get on" if at_work else "waits for the others, and is the least far"
    longest_s = max(beat.still_s for beat in (*answers, *silent))
    named = "; ".join(f"{beat.name} at {beat.place}" for beat in culprits[:4])
    if len(culprits) > 4:
        named += f"; and {len(culprits) - 4} others"
    if missing:
        named += ("; " if named else "") + f"ranks that never reported: {', '.join(map(str, missing[:8]))}"
    others = len(answers) - sum(beat in culprits for beat in answers)
    waiting = sorted({beat.place for beat in answers if beat not in culprits})
    waits = "1 other rank waits" if others == 1 else f"{others} other ranks wait"
    message = (
        f"the job hangs: no progress for {longest_s:.0f} s. {named}: {what}. {waits}"
        f"{' at ' + ', '.join(waiting[:3]) if waiting else ''}. The stacks of all ranks are in {folder}. The job ends; "
        "started again, it goes on from the last checkpoint"
    )
    return Verdict(message, culprits)


def write_own_stacks(folder: Path, beat: Beat) -> None:
    """Writes the stacks of this process's threads, whatever they do, and what NCCL has recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{beat.rank:05d}.txt").open("w", encoding="utf-8") as file:
        file.write(f"{beat.name} at {beat.place}, for {beat.still_s:.0f} s\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    _write_flight_record(folder / f"flight_record_{beat.rank:05d}.json")


def _write_flight_record(path: Path) -> None:
    """What the flight recorder of this rank's collectives holds, if it is on (`parallel/topology.py`)."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return
    record = dump()
    if isinstance(record, bytes):
        record = record.decode(errors="replace")
    if json.loads(record).get("entries"):
        path.write_text(record, encoding="utf-8")


def _signal_main_thread(pid: int, number: signal.Signals) -> None:
    """Sends a signal to the main thread of a process, which has the process's number.

    Another thread might take it, and write the stack of the main one while that goes on: it would be cut short.
    """
    send = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)
    if send is None:
        # A library of C older than glibc 2.30.
        os.kill(pid, number)
    elif send(pid, pid, number):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def take_stacks(folder: Path, beat: Beat) -> None:
    """Writes what can be found out about a process of this machine that does not answer, then ends it."""
    path = folder / f"rank_{beat.rank:05d}.txt"
    lines = [f"{beat.name} did not answer; last heard of at {beat.place}\n"]
    try:
        status = Path(f"/proc/{beat.pid}/status").read_text(encoding="utf-8")
        state = next(line for line in status.splitlines() if line.startswith("State"))
        lines.append(f"{state}; waits in {Path(f'/proc/{beat.pid}/wchan').read_text(encoding='utf-8') or '?'}\n\n")
        _signal_main_thread(beat.pid, STACKS_SIGNAL)
        # A stopped process writes nothing until it goes on.
        os.kill(beat.pid, signal.SIGCONT)
        stacks = Path(f"/proc/{beat.pid}/fd/{beat.stacks}")
        deadline_s, size = time.monotonic() + _STACKS_WAIT_S, -1
        # Until it has written something and writes no more.
        while time.monotonic() < deadline_s and (size <= 0 or stacks.stat().st_size != size):
            size = stacks.stat().st_size
            time.sleep(_STACKS_POLL_S)
        lines.append(stacks.read_text(encoding="utf-8", errors="replace") or "no stacks: stuck in the kernel\n")
        os.kill(beat.pid, signal.SIGKILL)
    except (OSError, StopIteration) as error:
        # Woken, it may have written its stacks and ended by itself.
        own = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines.append(own or f"the process is gone ({error})\n")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
