"""What one rank finds while a step is read or prepared ends all ranks alike, with the same error, or none of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from bitdance_scale.config.load import load_config
from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
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


def _read(rank: int, num_bad: tuple[int, int]) -> tuple[int, str]:
    """(steps read, error) of two replicas that skip so many of the 500 samples that each reads in its second step.

    Rank 2 belongs to the second replica and does not read.
    """
    import torch.distributed as dist

    from bitdance_scale.train import step_feed

    class SkippingLoader:
        """In the loader's place."""

        def __init__(self, config: Any, condition: Any, index: Any, data_rank: int, *_: Any) -> None:
            self.error_counter = ErrorCounter(config.data.max_skipped_share)
            self.error_counters = (self.error_counter,)
            self.replica, self.step = data_rank, 0

        def next_step(self) -> int:
            self.error_counter.record_read(500)
            for number in range(num_bad[self.replica] if self.step == 1 else 0):
                error = SampleError(ErrorCause.BAD_IMAGE, "cut")
                self.error_counter.record_skipped(error, f"{self.replica}.tar", f"key{number}")
            self.step += 1
            return self.step

        def close(self) -> None:
            pass

    step_feed.Loader, step_feed.share_step = SkippingLoader, lambda read, vision, topology: read
    dist.init_process_group("gloo")
    topology = SimpleNamespace(is_reader=rank < 2, data_rank=min(rank, 1), data_size=2)
    num_read = 0
    try:
        with step_feed.StepReader(load_config("demo"), object(), None, None, topology, None) as reader:
            for _ in range(4):
                assert reader.next_step() == (num_read + 1 if rank < 2 else None)
                num_read += 1
        return num_read, ""
    except DataError as error:
        return num_read, str(error)
    finally:
        dist.destroy_process_group()


def test_the_share_of_skipped_samples_is_that_of_the_run():
    assert load_config("demo").data.max_skipped_share == 0.001
    # Two of the first replica's thousand are twice what would be allowed to it alone.
    assert run_ranks(3, _read, (2, 0)) == [(4, "")] * 3
    ((num_read, message),) = set(run_ranks(3, _read, (20, 20)))
    assert num_read == 1
    assert message.startswith("40 of 2000 samples were skipped; bad_image 40 in 0.tar (20), 1.tar (20). That is more")
