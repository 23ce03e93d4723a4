"""Stands in for an entry point where only the launch is tested: `stand_in.py CONFIG crash|wait|finish FILE`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from bitdance_scale.train.process import EXIT_REQUEUE, record_exit


def main() -> int:
    """Ends with a fault, or well, or waits to be stopped, as a trainer is, and says in FILE that it does."""
    _, _, mode, file = sys.argv
    if mode == "crash":
        raise RuntimeError("the stand-in's fault")
    if mode == "finish":
        record_exit(0)
        return 0
    requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: requests.append(number))
    Path(file).touch()
    while not requests:
        time.sleep(0.1)
    record_exit(EXIT_REQUEUE)
    return EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(main())
