"""Runs torchrun on one node and passes requests to stop on to the trainer.

    srun ... python -m cluster.node --nodes N --procs P --head HOST --port PORT --id ID --logs DIR -- ENTRY_POINT CONFIG ...

Slurm sends a signal to every process of a step. Left to itself, torchrun answers SIGTERM by killing its workers 30 seconds
later, which a checkpoint of a large model does not survive. So torchrun and what it starts ignore SIGTERM and SIGUSR1;
the trainer's own handlers replace that once it listens. This process alone hears them and sends SIGUSR1 to the workers
until they have ended: the first may come while they still import.
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

    The static rendezvous gives ranks in Slurm's order of the nodes, which follows the network; rank 0 is on the first.
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
        # By default it handles SIGTERM as well.
        "--signals-to-handle=SIGINT",
        f"--log-dir={options.logs / 'ranks' / node_name}",
        "--tee=3",
        *options.command,
    ]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started itself; for a torchrun, its workers."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            # The thread has ended.
            continue
    return found


class Relay:
    """Passes requests to stop, which come as signals to this process, on to the workers."""

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
        process = subprocess.Popen(command, preexec_fn=_ignore_stop_signals)
        next_s = 0.0
        while process.poll() is None:
            if self.is_asked and time.monotonic() >= next_s:
                workers = children(process.pid)
                for worker in workers:
                    _ask_to_stop(worker)
                if next_s == 0.0:
                    print(f"node: asked to stop, passed on to {len(workers)} processes", flush=True)
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
        # It has ended since it was listed.
        return


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this node's part of the job; the exit code is torchrun's."""
    parser = argparse.ArgumentParser(description="Runs torchrun on this node of a Slurm job.")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--procs", type=int, required=True, help="processes on each")
    parser.add_argument("--head", required=True, help="first node, where the rendezvous is")
    parser.add_argument("--port", type=int, required=True, help="a free port of it")
    parser.add_argument("--id", required=True, help="differs between the starts of a job")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the logs of the ranks")
    parser.add_argument("command", nargs="+", help="entry point and its arguments")
    options = parser.parse_args(arguments)
    with Relay() as relay:
        command = torchrun_command(options, int(os.environ["SLURM_NODEID"]), os.environ["SLURMD_NODENAME"])
        return relay.run(command)


if __name__ == "__main__":
    sys.exit(main())
