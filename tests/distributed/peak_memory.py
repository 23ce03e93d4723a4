"""How much a process's own memory grows while a block runs, measured by another process."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import TracebackType

INTERVAL_S = 0.001


class PeakMemory:
    """Measures the peak of resident anonymous memory (RssAnon of Linux) over what it was when the block began.

    Pages of mapped files are left out: the kernel drops them when it needs room. A forked process looks on, since a
    thread of this one would have to wait for the interpreter's lock while a library writes or reads.

    Attributes:
        extra_bytes: the growth, once the block has ended.
    """

    def __enter__(self) -> PeakMemory:
        watched = Path(f"/proc/{os.getpid()}/status")
        self._begun_bytes = anonymous_bytes(watched)
        answer, answer_end = os.pipe()
        stop_end, self._stop = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            # Only one process may hold the stopping end; otherwise the other end never sees it close.
            os.close(self._stop)
            peak_bytes = 0
            while True:
                peak_bytes = max(peak_bytes, anonymous_bytes(watched))
                if select.select([stop_end], [], [], INTERVAL_S)[0]:
                    os.write(answer_end, str(peak_bytes).encode())
                    os._exit(0)
        os.close(stop_end)
        os.close(answer_end)
        self._answer = answer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._stop)
        with os.fdopen(self._answer) as answer:
            self.extra_bytes = int(answer.read()) - self._begun_bytes
        os.waitpid(self._child, 0)


def anonymous_bytes(status: Path) -> int:
    """RssAnon of a process's status file."""
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
