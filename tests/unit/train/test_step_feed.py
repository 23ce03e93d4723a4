"""The feed against a reader and a preparation that note what they are asked for."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from unittest import mock

import pytest
import torch

from bitdance_scale.data.loader import LoadedPack, LoadedStep
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.errors import DataError
from bitdance_scale.train.step_feed import StepFeed

CPU = torch.device("cpu")
WAIT_S = 10.0


def loaded_step(number: int) -> LoadedStep:
    """A step whose only pack is its number."""
    state = LoaderState(seed=0, index_hash="", plan_hash="", step=number + 1, pack=0, num_data_ranks=1)
    pack = LoadedPack(number, [], state, number, 1, True, Counter(), 0.0)
    return LoadedStep(number, [pack], state, {}, {}, Counter(), num_ready=0, wait_s=float(2**number))


class Source:
    """Steps numbered from `first`, each with its number as its pack; step n was waited for 2^n seconds."""

    def __init__(self, first: int = 0, broken: int | None = None) -> None:
        self.number, self.broken = first, broken
        self.read_by: list[str] = []

    def read(self) -> LoadedStep:
        number = self.number
        self.read_by.append(threading.current_thread().name)
        if number == self.broken:
            raise DataError(f"step {number} is unreadable")
        self.number += 1
        return loaded_step(number)


def prepare(packs: list[int], step: int) -> list[tuple[int, int, str]]:
    return [(pack, step, threading.current_thread().name) for pack in packs]


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("step-feed")]


def test_steps_come_in_order_and_none_is_read_after_the_last():
    source = Source(first=3)
    with StepFeed(source.read, prepare, 3, 6, CPU) as feed:
        for step in range(3, 6):
            ready = feed.take()
            assert [entry[:2] for entry in ready.batch] == [(step, step)] and ready.loaded.step == step
            assert ready.batch[0][2].startswith("step-feed")
            # The state after this step, though the next one is read already.
            assert ready.loaded.state.step == step + 1
            assert source.number == min(step + 2, 6)
    # Reading is a collective call: on the thread that trains.
    assert set(source.read_by) == {threading.current_thread().name} and len(source.read_by) == 3
    assert not feed_threads()


def test_next_step_is_prepared_while_this_one_trains():
    is_prepared = [threading.Event() for _ in range(3)]

    def note(packs: list[int], step: int) -> list[object]:
        is_prepared[step].set()
        return []

    with StepFeed(Source().read, note, 0, 3, CPU) as feed:
        feed.take()
        assert is_prepared[1].wait(WAIT_S), "step 1 was not prepared before it was asked for"
        assert not is_prepared[2].is_set(), "step 2 was prepared two steps ahead"


def test_waiting_belongs_to_the_step_in_whose_time_it_was():
    with StepFeed(Source().read, prepare, 0, 3, CPU) as feed:
        assert [feed.take().wait_s for _ in range(3)] == [1.0 + 2.0, 4.0, 0.0]


def test_unreadable_step_is_told_when_it_is_taken():
    with StepFeed(Source(broken=1).read, prepare, 0, 3, CPU) as feed:
        feed.take()
        for _ in range(2):
            with pytest.raises(DataError, match="step 1 is unreadable"):
                feed.take()
    with StepFeed(Source(broken=0).read, prepare, 0, 3, CPU) as feed, pytest.raises(DataError, match="step 0"):
        feed.take()


def test_error_of_the_preparation_comes_out_with_its_step():
    def fail(packs: list[int], step: int) -> list[object]:
        if step == 1:
            raise RuntimeError("step 1 does not fit")
        return []

    with StepFeed(Source().read, fail, 0, 3, CPU) as feed:
        feed.take()
        with pytest.raises(RuntimeError, match="step 1 does not fit"):
            feed.take()
    assert not feed_threads()


def test_close_waits_for_the_preparation_under_way():
    has_begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def slow(packs: list[int], step: int) -> list[object]:
        if step == 1:
            has_begun.set()
            assert may_end.wait(WAIT_S)
        ended.append(step)
        return []

    with StepFeed(Source().read, slow, 0, 3, CPU) as feed:
        feed.take()
        assert has_begun.wait(WAIT_S)
        may_end.set()
    assert ended == [0, 1] and not feed_threads()


def test_on_cuda_a_step_is_read_when_the_device_has_work(monkeypatch):
    """What hosts exchange and write for the next step waits neither for the present step nor for its kernels."""
    events: list[str] = []
    # The streams of a device that is not there: what is recorded is the order in which they are used.
    training, own = mock.MagicMock(), mock.MagicMock()
    training.wait_stream.side_effect = lambda _: events.append("training waits for the inputs")
    training.record_event.side_effect = lambda: events.append("event") or f"event {events.count('event')}"
    own.wait_event.side_effect = lambda event: events.append(f"inputs wait for {event}")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: own)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    source = Source()
    with StepFeed(source.read, prepare, 0, 3, torch.device("cuda")) as feed:
        feed.take()
        assert source.number == 1
        events.append("the first micro-batch is queued")
        feed.read_ahead()
        feed.read_ahead()
        assert source.number == 2
        feed.take()
    assert events == [
        "training waits for the inputs",
        "event",
        "the first micro-batch is queued",
        "inputs wait for event 1",
        "training waits for the inputs",
        "event",
    ]


def test_an_error_of_reading_ahead_comes_out_with_its_step():
    with StepFeed(Source(broken=1).read, prepare, 0, 3, CPU) as feed:
        feed.take()
        feed.read_ahead()
        with pytest.raises(DataError, match="step 1 is unreadable"):
            feed.take()
