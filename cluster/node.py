"""Runs torchrun on one node and forwards requests to stop to the trainer.

    srun ... python -m cluster.node --nodes N --procs P --head HOST --port PORT --id ID --logs DIR -- ENTRY_POINT CONFIG

Slurm signals every process of a step. On SIGTERM torchrun kills its workers after 30 seconds, too early for a large
model to finish its checkpoint. So torchrun and its workers start with SIGTERM and SIGUSR1 ignored, until the trainer
installs its own handlers. Only this process hears the signals. It sends SIGUSR1 to the workers until they end: the
first one may come while they still import.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.5
REPEAT_S = 5.0


def torchrun_command(options: argparse.Namespace, node_rank: int, node_name: str) -> list[str]:
    """The command of this node's torchrun.

    The static rendezvous numbers the ranks in Slurm's order of the nodes, which follows the network; rank 0 is on the
    first node.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={options.nodes}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={options.procs}",
        "--rdzv-backend=static",
        f"--rdzv-id={options.id}",
        f"--master-addr={options.head}",
        f"--master-port={options.port}",
        # Slurm restarts the job as a whole.
        "--max-restarts=0",
        # Its default includes SIGTERM.
        "--signals-to-handle=SIGINT",
        f"--log-dir={options.logs / 'ranks' / node_name}",
        "--tee=3",
        *options.command,
    ]


def children(pid: int) -> list[int]:
    """The direct children of a process; for torchrun, its workers."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            # The thread has ended.
            continue
    return found


class Relay:
    """Forwards requests to stop, which this process gets as signals, to the workers."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Relay:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *details: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def run(self, command: Sequence[str]) -> int:
        """Runs the command to its end and returns its exit code."""
        # This process has one thread, so that code between fork and exec cannot meet another thread's lock.
        process = subprocess.Popen(command, preexec_fn=_ignore_stop_signals)  # noqa: PLW1509
        next_s = 0.0
        while process.poll() is None:
            if self.is_asked and time.monotonic() >= next_s:
                workers = children(process.pid)
                for worker in workers:
                    _ask_to_stop(worker)
                if next_s == 0.0:
                    print(f"node: request to stop forwarded to {len(workers)} processes", flush=True)
                next_s = time.monotonic() + REPEAT_S
            time.sleep(POLL_S)
        return process.returncode

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _ask_to_stop(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGUSR1)
    except ProcessLookupError:
        # It ended after it was listed.
        return


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun on this node and returns its exit code."""
    parser = argparse.ArgumentParser(description="Runs torchrun on this node of a Slurm job.")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--procs", type=int, required=True, help="processes per node")
    parser.add_argument("--head", required=True, help="address of the first node, which hosts the rendezvous")
    parser.add_argument("--port", type=int, required=True, help="a free port on the first node")
    parser.add_argument("--id", required=True, help="id of the rendezvous, different for every start of a job")
    parser.add_argument(
        "--logs", type=Path, required=True, help="folder for the logs of the ranks, on the shared file system"
    )
    parser.add_argument("command", nargs="+", help="entry point and its arguments")
    options = parser.parse_args(arguments)
    with Relay() as relay:
        command = torchrun_command(options, int(os.environ["SLURM_NODEID"]), os.environ["SLURMD_NODENAME"])
        return relay.run(command)


if __name__ == "__main__":
    sys.exit(main())
