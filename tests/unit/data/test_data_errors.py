"""Counting sample errors: by cause and shard, and the stop of the run."""

from __future__ import annotations

import pytest

from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
from bitdance_scale.errors import DataError

BROKEN = SampleError(ErrorCause.BAD_IMAGE, "image file is truncated")


def check(*replicas: ErrorCounter) -> None:
    """What every replica of a job does after a step."""
    totals = [sum(values) for values in zip(*(replica.totals for replica in replicas), strict=True)]
    messages = set()
    for replica in replicas:
        try:
            replica.check(totals, lambda _: replicas)
        except DataError as error:
            messages.add(str(error))
        else:
            messages.add("")
    (message,) = messages
    if message:
        raise DataError(message)


def test_stops_past_the_share_and_names_the_shards() -> None:
    counter = ErrorCounter(max_skipped_share=0.002)
    counter.record_read(999)
    for number in range(3):
        counter.record_skipped(BROKEN, f"{number % 2}.tar", f"key{number}")
    counter.record_caption(ErrorCause.EMPTY_CAPTION, "0.tar")
    check(counter)
    counter.record_read()
    with pytest.raises(DataError) as stopped:
        check(counter)
    message = str(stopped.value)
    assert "3 of 1000 samples were skipped; bad_image 3 in 0.tar (2), 1.tar (1); empty_caption 1 in" in message
    assert "data.max_skipped_share=0.002" in message
    assert "Latest: 0.tar: sample key2: bad_image: image file is truncated" in message
    counter.record_read(500)
    check(counter)
    assert counter.counts() == {"bad_image": {"0.tar": 2, "1.tar": 1}, "empty_caption": {"0.tar": 1}}


def test_the_share_is_that_of_all_replicas() -> None:
    bad, clean = ErrorCounter(0.001), ErrorCounter(0.001)
    bad.record_read(1000)
    for number in range(2):
        bad.record_skipped(BROKEN, "0.tar", f"key{number}")
    with pytest.raises(DataError, match="2 of 1000 samples"):
        check(bad)
    clean.record_read(1000)
    check(bad, clean)
    clean.record_skipped(SampleError(ErrorCause.READ_FAILED, "no such file"), "1.tar", "key7")
    clean.record_skipped(BROKEN, "0.tar", "key8")
    with pytest.raises(DataError) as stopped:
        check(bad, clean)
    message = str(stopped.value)
    assert "4 of 2000 samples were skipped; bad_image 3 in 0.tar (3); read_failed 1 in 1.tar (1)." in message
    assert "Latest: 0.tar: sample key8" in message
    assert (bad.totals, clean.totals) == ((1000, 2), (1000, 2))


def test_few_samples_of_many_replicas_are_enough() -> None:
    replicas = [ErrorCounter(0.001) for _ in range(3)]
    for replica in replicas[:2]:
        replica.record_read(400)
        replica.record_skipped(BROKEN, "0.tar", "key")
    check(*replicas)
    replicas[2].record_read(200)
    with pytest.raises(DataError, match="2 of 1000 samples"):
        check(*replicas)


def test_samples_without_a_caption_are_not_skipped() -> None:
    counter = ErrorCounter(max_skipped_share=0.0)
    counter.record_read(5000)
    for _ in range(5000):
        counter.record_caption(ErrorCause.MISSING_CAPTION, "0.tar")
    check(counter)
    assert counter.num_skipped == 0


def test_many_shards_are_summed_up() -> None:
    counter = ErrorCounter(0.0)
    for number in range(5):
        counter.record_skipped(BROKEN, f"{number}.tar", "key")
    assert counter.summary().endswith("bad_image 5 in 0.tar (1), 1.tar (1), 2.tar (1) and 2 more shards")
