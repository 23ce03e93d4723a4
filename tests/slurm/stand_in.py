"""An entry point for tests of the launch alone: `stand_in.py CONFIG crash|wait|finish FILE`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, run_process


def main() -> int:
    """Crashes, finishes, or makes FILE and then waits for a request to stop, as a trainer does."""
    _, _, mode, file = sys.argv
    if mode == "crash":
        raise RuntimeError("crash of the stand-in")
    if mode == "finish":
        return EXIT_COMPLETE
    requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: requests.append(number))
    Path(file).touch()
    while not requests:
        time.sleep(0.1)
    return EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(run_process(main))
