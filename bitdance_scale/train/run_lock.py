"""One process per run folder: a lock file that says who holds it, and that a later start may take over from the dead.

The file appears by a hard link, which one of several processes wins on every file system, NFS and Lustre included;
advisory locks do not hold on all of them. The holder touches it every few seconds. Whether a holder on another machine
is alive is not read off a clock, as clocks differ: whoever wants the folder watches the file until it is touched, or
until it has not been for `STALE_S`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.errors import ConfigError, TrainingError
from bitdance_scale.train.hang_report import machine_id

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
STALE_S = 60.0
"""Without a sign of life for so long, the holder is dead. Holders touch the file every 10 seconds or more often."""
_POLL_S = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder.

    Attributes:
        host: name of the machine.
        pid: the process.
        started: when it took the folder, in UTC.
        job: id of its Slurm job; empty without Slurm.
        restart: how often Slurm has started this job again.
        machine: identifies the machine and its process ids.
        process_start: when the process was started, in clock ticks since the machine was.
        token: of this lock alone.
    """

    host: str
    pid: int
    started: str
    job: str
    restart: int
    machine: str
    process_start: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        """This process as the holder of a new lock."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            machine=machine_id(),
            process_start=_process_start(os.getpid()),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"


class RunLock:
    """The lock of a run folder, held by one process of a job. A context manager.

    Args:
        folder: run folder; made if absent.
        stale_s: seconds without a sign of life after which a holder counts as dead.

    Attributes:
        taken_over: from whom the folder was taken over and why; empty: from nobody.

    Raises:
        ConfigError: a running job holds the folder; the message says which.
    """

    def __init__(self, folder: Path, stale_s: float = STALE_S) -> None:
        self._path, self._stale_s = folder / LOCK_FILE, stale_s
        self._own = Holder.this_process()
        self.taken_over = ""
        folder.mkdir(parents=True, exist_ok=True)
        mine = self._path.with_name(f"{LOCK_FILE}.{self._own.token}")
        mine.write_text(json.dumps(dataclasses.asdict(self._own)) + "\n", encoding="utf-8")
        try:
            while not self._link(mine, self._path):
                self._take_over(mine)
        finally:
            mine.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *details: object) -> None:
        if self._read() == self._own:
            self._path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Shows that the holder is alive; called every 10 seconds or more often.

        Raises:
            TrainingError: the lock is another process's now.
        """
        try:
            if self._read() == self._own:
                os.utime(self._path)
                return
        except OSError as error:
            # A file system that does not answer for a while is no other holder.
            logger.debug("%s: %s", self._path, error)
            return
        raise TrainingError(
            f"{self._path} is no longer this process's ({self._read() or 'it is gone'}): another start took this for "
            "dead, perhaps because it was suspended. This one ends, so that the two do not write over each other"
        )

    def _link(self, mine: Path, path: Path) -> bool:
        """Makes a lock of this content; False: there is one."""
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        except OSError:
            # No hard links here: exclusive creation, which local file systems and NFS from version 3 on keep.
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(mine.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        return True

    def _take_over(self, mine: Path) -> None:
        """Removes the lock of a dead holder; returns also when the lock has gone meanwhile."""
        holder = self._read()
        if holder is None and not self._path.exists():
            return
        reason = self._why_dead(holder)
        if reason is None:
            assert holder is not None, "a lock that cannot be read is watched until it is stale"
            raise ConfigError(
                f"{self._path.parent}: another process trains in this run folder: {holder}. Stop it first, or give "
                "this run another name (run.name=NAME)"
            )
        # One at a time: of two that found the same holder dead, the slower one must not remove the lock of the faster.
        guard = self._path.with_name(f"{LOCK_FILE}.takeover")
        if not self._link(mine, guard):
            if self._watch(guard) is None:
                guard.unlink(missing_ok=True)
            return
        try:
            if self._read() == holder:
                self._path.unlink(missing_ok=True)
                former = holder or "an unknown process"
                self.taken_over = f"{self._path}: took the run folder over from {former}: {reason}"
        finally:
            guard.unlink(missing_ok=True)

    def _why_dead(self, holder: Holder | None) -> str | None:
        """Why the holder is taken for dead; None: it is alive."""
        own = self._own
        if holder is not None and holder.machine == own.machine:
            return None if _process_start(holder.pid) == holder.process_start else "that process has ended"
        if holder is not None and own.job and holder.job == own.job and holder.restart < own.restart:
            return "Slurm has started its job again"
        logger.warning(
            "%s: held by %s; watching for %.0f s whether it is alive", self._path, holder or "?", self._stale_s
        )
        if self._watch(self._path) is None:
            return f"it has not touched its lock for {self._stale_s:.0f} s"
        return None if self._read() is not None else "its lock has gone or cannot be read"

    def _watch(self, path: Path) -> bool | None:
        """True as soon as a file is touched or gone; None: neither happened for as long as a holder may be silent."""
        touched, deadline_s = _touched(path), time.monotonic() + self._stale_s
        while time.monotonic() < deadline_s:
            time.sleep(min(_POLL_S, self._stale_s / 10))
            now = _touched(path)
            if now is None or now != touched:
                return True
        return None

    def _read(self) -> Holder | None:
        return _read_holder(self._path)


def _read_holder(path: Path) -> Holder | None:
    """Who a lock file names; None: there is no such file, or it cannot be read as one."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _process_start(pid: int) -> str:
    """When a process was started, in clock ticks since the machine was; empty: there is no such process.

    A zombie has ended too. A process whose number is used again has another start.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name, in parentheses, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _touched(path: Path) -> int | None:
    """When a file was last touched, in ns by the clock of its file system; None: there is none."""
    try:
        # Opened, because NFS then asks the server and not its cache.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
