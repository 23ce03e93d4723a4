"""A preparation that fails on one rank ends all of them, with its error."""

from __future__ import annotations

from bitdance_scale.errors import DataError
from tests.distributed.spawn import run_ranks


def _feed(rank: int) -> tuple[int, str]:
    """(steps taken, error) when rank 1 cannot prepare step 2."""
    import torch
    import torch.distributed as dist

    from bitdance_scale.parallel.broadcast import SharedStep
    from bitdance_scale.train.feed import StepFeed
    from bitdance_scale.train.reading import StepReport

    def prepare(packs: list[int], step: int) -> list[int]:
        if rank == 1 and step == 2:
            raise DataError(f"rank {rank} has no room for step {step}")
        return list(packs)

    dist.init_process_group("gloo")
    num_taken = 0
    try:
        with StepFeed(
            lambda: SharedStep([0], StepReport({}, {}, {}, 0, 0.0)), prepare, 0, 5, torch.device("cpu")
        ) as feed:
            while True:
                feed.take()
                num_taken += 1
    except DataError as error:
        return num_taken, str(error)
    finally:
        dist.destroy_process_group()


def test_error_of_one_rank_is_raised_on_all():
    assert run_ranks(2, _feed) == [(2, "rank 1 has no room for step 2")] * 2
