"""Runs torchrun on one node and forwards requests to stop to the trainer.

    srun ... python -m cluster.node --nodes N --procs P --head HOST --port PORT --id ID --logs DIR -- ENTRY_POINT CONFIG

Of another launcher than Slurm, cluster/each_node.sh calls it with --node-rank and --node-name. Slurm signals every
process of a step. As in `bitdance train`, only this process hears the signals, and it sends SIGUSR1
to the ranks until they end (`cli/launch.py` says why). start.sh starts it with the signals ignored: until it listens,
they would kill it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.launch import Relay
from bitdance_scale.train.process import STOP_SIGNALS


def torchrun_command(options: argparse.Namespace, node_rank: int, node_name: str) -> list[str]:
    """The command of this node's torchrun.

    The static rendezvous numbers the ranks in the launcher's order of the nodes, which under Slurm follows the network;
    rank 0 is on the first node.
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
        # The launcher restarts the job as a whole.
        "--max-restarts=0",
        # Its default includes SIGTERM.
        "--signals-to-handle=SIGINT",
        f"--log-dir={options.logs / 'ranks' / node_name}",
        "--tee=3",
        *options.command,
    ]


class NodeRelay(Relay):
    """A `Relay` that logs what it passes on, and ignores requests that come after the end of torchrun."""

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def forwarded(self, num_ranks: int) -> None:
        """Says so in the node's log."""
        print(f"node: request to stop forwarded to {num_ranks} processes", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun on this node and returns its exit code."""
    parser = argparse.ArgumentParser(description="Runs torchrun on this node of a job.")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--procs", type=int, required=True, help="processes per node")
    parser.add_argument("--head", required=True, help="address of the first node, which hosts the rendezvous")
    parser.add_argument("--port", type=int, required=True, help="a free port on the first node")
    parser.add_argument("--id", required=True, help="id of the rendezvous, different for every start of a job")
    parser.add_argument(
        "--logs", type=Path, required=True, help="folder for the logs of the ranks, on the shared file system"
    )
    parser.add_argument("--node-rank", type=int, help="number of this node, from 0 [as Slurm says]")
    parser.add_argument("--node-name", help="name of this node [as Slurm says]")
    parser.add_argument("command", nargs="+", help="entry point and its arguments")
    options = parser.parse_args(arguments)
    rank = int(os.environ["SLURM_NODEID"]) if options.node_rank is None else options.node_rank
    name = options.node_name or os.environ["SLURMD_NODENAME"]
    with NodeRelay() as relay:
        return relay.run(torchrun_command(options, rank, name))


if __name__ == "__main__":
    sys.exit(main())
