"""An entry point for tests of the launch alone: `stand_in.py CONFIG ... crash|advance|hang|wait|finish FILE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_HUNG, EXIT_REQUEUE, leave_record, record_step, run_process

# Starts in which `advance` commits a checkpoint before it crashes.
NUM_ADVANCES = 3


def main() -> int:
    """Crashes, finishes, or makes FILE and then waits for a request to stop, as a trainer does.

    To advance is to crash too, in the first starts after a checkpoint was committed.
    """
    *_, mode, file = sys.argv
    if mode == "advance" and os.environ["RANK"] == "0":
        starts = Path(file)
        number = len(starts.read_text(encoding="utf-8")) + 1 if starts.exists() else 1
        starts.write_text("x" * number, encoding="utf-8")
        if number <= NUM_ADVANCES:
            record_step(100 * number)
    if mode in ("crash", "advance"):
        raise RuntimeError("crash of the stand-in")
    if mode == "hang":
        # As the heartbeat ends every rank.
        leave_record(EXIT_HUNG, "TrainingError: the job hangs: rank 1 does not answer", from_any=True)
        os._exit(EXIT_HUNG)
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
