"""A preparation that fails on one rank ends all of them, with its error."""

from __future__ import annotations

from collections import Counter

from bitdance_scale.errors import DataError
from tests.distributed.spawn import run_ranks


def _feed(rank: int) -> tuple[int, str]:
    """(steps taken, error) when rank 1 cannot prepare step 2."""
    import torch
    import torch.distributed as dist

    from bitdance_scale.data.loader import LoadedStep
    from bitdance_scale.data.loader_state import LoaderState
    from bitdance_scale.train.step_feed import StepFeed

    def prepare(packs: list[int], step: int) -> list[int]:
        if rank == 1 and step == 2:
            raise DataError(f"no room for step {step}")
        return list(packs)

    dist.init_process_group("gloo")
    num_taken = 0
    try:
        state = LoaderState(seed=0, index_hash="", plan_hash="", step=0, pack=0, num_data_ranks=1)
        step = LoadedStep(0, [], state, {}, {}, Counter(), num_ready=0, wait_s=0.0)
        with StepFeed(lambda: step, prepare, 0, 5, torch.device("cpu")) as feed:
            while True:
                feed.take()
                num_taken += 1
    except DataError as error:
        return num_taken, str(error)
    finally:
        dist.destroy_process_group()


def test_error_of_one_rank_is_raised_on_all():
    assert run_ranks(2, _feed) == [(2, "rank 1: no room for step 2")] * 2
