"""An error of one rank is raised on all of them, and keeps its type."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from bitdance_scale.errors import BitDanceError, CheckpointError, ConfigError, DataError
from bitdance_scale.parallel.agreement import all_ranks, any_rank, from_all_ranks, on_first_rank, summed_numbers
from tests.distributed.spawn import run_ranks


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail_on(rank: int, failing: tuple[int, ...], error: Exception) -> None:
    if rank in failing:
        raise error


def every_kind(rank: int) -> None:
    dist.init_process_group("gloo")
    for kind in (ConfigError, DataError, CheckpointError):
        for failing, message in (
            ((1,), "rank 1: wrong"),
            ((0, 1, 2), "wrong"),
            ((0, 2), "rank 0: wrong; rank 2: wrong"),
        ):
            with pytest.raises(BitDanceError) as found, all_ranks():
                fail_on(rank, failing, kind("wrong"))
            assert type(found.value) is kind and str(found.value) == message
    # Errors of two types: the first rank's counts, and both are told.
    with pytest.raises(DataError, match="rank 1: no shard; rank 2: no key"), all_ranks():
        fail_on(rank, (1,), DataError("no shard"))
        fail_on(rank, (2,), ConfigError("no key"))
    with pytest.raises(OSError, match="disk"), all_ranks():
        fail_on(rank, (2,), OSError("disk"))
    with pytest.raises(CheckpointError, match="rank 2: OSError: disk"), all_ranks(other=CheckpointError):
        fail_on(rank, (2,), OSError("disk"))
    with pytest.raises(RuntimeError, match="Unpicklable: ab"), all_ranks():
        fail_on(rank, (0, 1, 2), Unpicklable("a", "b"))
    with all_ranks():
        pass
    sums = [0, 0]
    with all_ranks(sums=sums):
        sums[:] = rank, 2**40
    assert sums == [3, 3 * 2**40]
    with pytest.raises(DataError, match="rank 1: wrong"), all_ranks(sums=sums):
        fail_on(rank, (1,), DataError("wrong"))
        sums[:] = 1, 1
    assert summed_numbers([rank, 1]) == [3, 3] and from_all_ranks(str(rank)) == ["0", "1", "2"]
    assert any_rank(rank == 2) and not any_rank(False)
    assert on_first_rank(lambda: rank) == 0
    with pytest.raises(ConfigError, match="^first$"):
        on_first_rank(lambda: fail_on(rank, (0,), ConfigError("first")))
    with pytest.raises(CheckpointError, match="^KeyError: 'x'$"):
        on_first_rank(lambda: {}["x"], other=CheckpointError)
    dist.destroy_process_group()


def test_every_rank_raises_what_one_has_found() -> None:
    run_ranks(3, every_kind, timeout_s=60)


def test_without_a_process_group_they_are_plain_calls() -> None:
    with pytest.raises(ConfigError, match="^wrong$"), all_ranks():
        raise ConfigError("wrong")
    with pytest.raises(CheckpointError, match="^OSError: disk$"), all_ranks(other=CheckpointError):
        raise OSError("disk")
    sums = [4]
    with all_ranks(sums=sums):
        sums[0] += 1
    assert sums == [5] == summed_numbers([5]) == from_all_ranks(5)
    assert on_first_rank(lambda: 3) == 3 and any_rank(True) and not any_rank(False)
