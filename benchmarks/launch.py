"""Starts `workload.py` on several ranks of this machine and reads its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKLOAD = Path(__file__).parent / "workload.py"


def run_workload(num_ranks: int, arguments: Sequence[str], timeout_s: float = 600.0) -> dict[str, object]:
    """The JSON line of one run; raises RuntimeError with what the ranks said when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*command, str(WORKLOAD), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
