"""Brings the nodes of one start together, where their launcher does not tell them about each other.

    python -m cluster.join FILE --nodes N --rank R --name NAME --head ADDRESS --port PORT --start S --timeout SECONDS

Every node runs it. It writes to FILE the number of the start, which the first node says, and the names of all nodes in
the order of their ranks, a line each. A node whose name another one has too gets its rank behind it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

POLL_S = 0.2


def distinct(names: Sequence[str]) -> list[str]:
    """The names, those that several nodes have with the node's rank behind them."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{rank}" for rank, name in enumerate(names)]


def join(options: argparse.Namespace) -> tuple[int, list[str]]:
    """Waits until all nodes are there; returns the number of the start and their names.

    Raises:
        RuntimeError: a node did not come in time.
    """
    deadline_s = time.monotonic() + options.timeout
    store = _reach(options, deadline_s)
    store.set(f"name/{options.rank}", options.name)
    if options.rank == 0:
        store.set("start", str(options.start))
    names = [store.get(f"name/{rank}").decode() for rank in range(options.nodes)]
    start = int(store.get("start"))
    # The first node's store must live until all have read it.
    store.add("left", 1)
    while options.rank == 0 and store.add("left", 0) < options.nodes and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return start, distinct(names)


def _reach(options: argparse.Namespace, deadline_s: float) -> TCPStore:
    """The first node's store; its name may not resolve, and nobody listen there, until its machine has started."""
    is_first = options.rank == 0
    while True:
        left_s = max(deadline_s - time.monotonic(), 1.0)
        timeout = datetime.timedelta(seconds=left_s)
        try:
            return TCPStore(options.head, options.port, is_master=is_first, timeout=timeout, wait_for_workers=False)
        except RuntimeError:
            if is_first or time.monotonic() + POLL_S > deadline_s:
                raise
            time.sleep(POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the start and the names; returns 1 if not all nodes came."""
    parser = argparse.ArgumentParser(description="Brings the nodes of one start of a job together.")
    parser.add_argument("file", type=Path, help="file for the start and the names")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--rank", type=int, required=True, help="number of this node, from 0")
    parser.add_argument("--name", required=True, help="name of this node")
    parser.add_argument("--head", required=True, help="address of the first node")
    parser.add_argument("--port", type=int, required=True, help="a free port on the first node")
    parser.add_argument("--start", type=int, required=True, help="number of the start; that of the first node counts")
    parser.add_argument("--timeout", type=float, required=True, help="seconds to wait for all nodes")
    options = parser.parse_args(arguments)
    try:
        start, names = join(options)
    except RuntimeError as error:
        print(f"join: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    # Not to standard output, where a library may print as it is imported.
    options.file.write_text("\n".join([str(start), *names]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
