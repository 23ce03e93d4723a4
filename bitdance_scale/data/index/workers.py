"""Runs the tasks of a scan in several processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
_BYTES_PER_WORKER = 1 << 31
_MAX_WORKERS = 32
_TASKS_PER_WORKER = 4


def default_workers(num_bytes: int) -> int:
    """Processes for an amount to read; little is read in this process."""
    return min(num_bytes // _BYTES_PER_WORKER, len(os.sched_getaffinity(0)), _MAX_WORKERS)


def in_processes(work: Callable[[In], Out], tasks: Iterable[In], num_workers: int) -> Iterator[Out]:
    """Results of `work` for every task in any order, from other processes if there are several workers and tasks.

    Few results wait in memory, however many tasks there are.
    """
    if num_workers < 2:
        yield from map(work, tasks)
        return
    # Forking this process could copy threads and CUDA; the server has neither.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("forkserver")) as pool:
        waiting = iter(tasks)
        running = {pool.submit(work, task) for task in itertools.islice(waiting, _TASKS_PER_WORKER * num_workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, task) for task in itertools.islice(waiting, len(done))}
                while done:
                    yield done.pop().result()
        finally:
            pool.shutdown(cancel_futures=True)
