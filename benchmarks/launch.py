"""Starts scripts on several ranks of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKLOAD = Path(__file__).parent / "workload.py"


def run_ranks(num_ranks: int, script: str, arguments: Sequence[str], timeout_s: float | None = None) -> str:
    """Runs a script on several ranks and returns its output; raises RuntimeError with the output if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*command, script, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def run_workload(num_ranks: int, arguments: Sequence[str], timeout_s: float = 600.0) -> dict[str, object]:
    """The JSON line of one run of `workload.py`; otherwise as `run_ranks`."""
    output = run_ranks(num_ranks, str(WORKLOAD), arguments, timeout_s)
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
