"""Runs one function on several ranks of a local job, for tests that need real process groups."""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A rank that fails usually takes its peers with it through broken connections; those that only wait are killed later.
FAILURE_GRACE_S = 5.0
KILL_MARGIN_S = 5.0


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    on_gpu: bool = False,
    grace_s: float = FAILURE_GRACE_S,
) -> list[Any]:
    """Calls `fn(rank, *args)` in `world_size` fresh processes and returns their results, rank by rank.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (a free port) set as
    torchrun sets them and OMP_NUM_THREADS=1; without `on_gpu` it sees no GPU, so that ranks may outnumber the GPUs.
    `fn` makes its own process group and must be importable (module level).
    `fn`, `args` and the results are pickled. Once a rank has failed, the others have `grace_s` to end.

    Raises:
        AssertionError: when a rank raises, dies or is not done after `timeout_s`; the message holds the ranks'
            tracebacks, the first failure first, and the stacks of ranks that hang. No process is left.
    """
    # Forked from a server that has imported the engines; CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    if not on_gpu:
        context.set_forkserver_preload(["tests.distributed.preload"])
    port = _free_port()
    deadline = time.time() + timeout_s
    processes, readers = [], []
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / str(rank) for rank in range(world_size)]
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                environment = _rank_environment(rank, world_size, port, on_gpu)
                arguments = (writer, deadline, stacks[rank], rank, environment, fn, args)
                process = context.Process(target=_rank_main, args=arguments, daemon=True)
                process.start()
                # The reader sees the end of the pipe only when no other process holds the writing end.
                writer.close()
                processes.append(process)
                readers.append(reader)
            return _collect(processes, readers, stacks, deadline, grace_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            for reader in readers:
                reader.close()


def _rank_main(
    writer: multiprocessing.connection.Connection,
    deadline: float,
    stacks: Path,
    rank: int,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    stack_file = stacks.open("w")
    faulthandler.dump_traceback_later(max(deadline - time.time(), 0.1), exit=True, file=stack_file)
    try:
        message = ("result", fn(rank, *args))
        # Plain pickle: the connection's own would pass tensors in shared memory, which ends with this process.
        payload = pickle.dumps(message)
    except BaseException:  # noqa: BLE001  (whatever ends a rank is reported to the test)
        payload = pickle.dumps(("error", traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    writer.send_bytes(payload)
    writer.close()


def _collect(
    processes: list[Any],
    readers: list[multiprocessing.connection.Connection],
    stacks: list[Path],
    deadline: float,
    grace_s: float,
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(readers))
    end = deadline + KILL_MARGIN_S
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(end - time.time(), 0.0))
        if not ready:
            break
        for rank in [rank for rank, reader in waiting.items() if reader in ready]:
            reader = waiting.pop(rank)
            try:
                kind, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                kind, value = "error", _describe_death(processes[rank], stacks[rank])
            if kind == "result":
                results[rank] = value
                continue
            failures[rank] = value
            end = min(end, time.time() + grace_s)
    if not failures and not waiting:
        return [results[rank] for rank in range(len(processes))]
    for rank in waiting:
        failures[rank] = "still running; killed\n"
    raise AssertionError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in failures.items()))


def _describe_death(process: Any, stacks: Path) -> str:
    process.join(KILL_MARGIN_S)
    stack = stacks.read_text() if stacks.exists() else ""
    if stack:
        return f"reached the time limit\n{stack}"
    return f"died with exit code {process.exitcode} before it returned\n"


def _rank_environment(rank: int, world_size: int, port: int, on_gpu: bool) -> dict[str, str]:
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return hidden | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
