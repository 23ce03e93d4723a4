from __future__ import annotations

import os
import time

import pytest

from tests.distributed.spawn import run_ranks


def _all_reduce(rank: int, scale: float) -> list[float]:
    # Here and not at the top: the other ranks of this file start in a tenth of the time without it.
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([scale * (rank + 1)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value.tolist()


def _fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one has failed")
    time.sleep(60)


def _die(rank: int) -> None:
    os._exit(7)


def _hang(rank: int) -> None:
    time.sleep(60)


def test_ranks_form_a_group_and_return_results():
    before = dict(os.environ)
    assert run_ranks(2, _all_reduce, 2.0) == [[6.0], [6.0]]
    assert dict(os.environ) == before


def test_a_failure_shows_the_traceback_and_kills_the_others():
    start = time.time()
    with pytest.raises(AssertionError, match="(?s)rank 1.*rank one has failed.*rank 0.*still running"):
        run_ranks(2, _fail_on_one)
    # Well under the sleep of the hanging rank and the default time limit.
    assert time.time() - start < 40


def test_a_death_names_the_exit_code():
    with pytest.raises(AssertionError, match="exit code 7"):
        run_ranks(1, _die)


def test_a_hang_ends_at_the_time_limit_and_shows_where():
    with pytest.raises(AssertionError, match="(?s)reached the time limit.*_hang"):
        run_ranks(1, _hang, timeout_s=4.0)
