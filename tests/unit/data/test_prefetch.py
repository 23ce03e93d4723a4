"""The thread that works ahead: order, bound, failures, shutdown."""

from __future__ import annotations

import threading
import time

import pytest

from bitdance_scale.data.prefetch import Prefetcher


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_order_and_bound() -> None:
    made: list[int] = []
    ahead = Prefetcher(lambda number: made.append(number) or number * 10, first=3, num_ahead=2)
    assert wait_until(lambda: len(made) == 2)
    # Nothing more may come however long one waits; a twentieth of a second is a thousand times what an item takes.
    time.sleep(0.05)
    assert made == [3, 4]
    assert [ahead.take() for _ in range(4)] == [30, 40, 50, 60]
    assert wait_until(lambda: made == [3, 4, 5, 6, 7, 8])
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        ahead.take()


def test_failure_reaches_the_consumer_after_what_was_made_before() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("disk on fire")
        return number

    ahead = Prefetcher(make, first=0, num_ahead=4)
    assert [ahead.take(), ahead.take()] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            ahead.take()
    ahead.close()


@pytest.mark.parametrize("num_taken", [0, 1])
def test_close_ends_a_waiting_thread(num_taken: int) -> None:
    ahead = Prefetcher(lambda number: number, first=0, num_ahead=1)
    for _ in range(num_taken):
        ahead.take()
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-planner"]
