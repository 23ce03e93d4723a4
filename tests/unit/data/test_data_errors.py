"""Counting sample errors: by cause and shard, and the stop of the run."""

from __future__ import annotations

import pytest

from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
from bitdance_scale.errors import DataError

BROKEN = SampleError(ErrorCause.BAD_IMAGE, "image file is truncated")


def test_stops_past_the_share_and_names_the_shards() -> None:
    counter = ErrorCounter(max_skipped_share=0.002)
    counter.record_read(999)
    for number in range(3):
        counter.record_skipped(BROKEN, f"{number % 2}.tar", f"key{number}")
    counter.record_caption(ErrorCause.EMPTY_CAPTION, "0.tar")
    counter.check()
    counter.record_read()
    with pytest.raises(DataError) as stopped:
        counter.check()
    message = str(stopped.value)
    assert "3 of 1000 samples were skipped; bad_image 3 in 0.tar (2), 1.tar (1); empty_caption 1 in" in message
    assert "data.max_skipped_share=0.002" in message
    assert "Latest: 0.tar: sample key2: bad_image: image file is truncated" in message
    counter.record_read(500)
    counter.check()
    assert counter.counts() == {"bad_image": {"0.tar": 2, "1.tar": 1}, "empty_caption": {"0.tar": 1}}


def test_samples_without_a_caption_are_not_skipped() -> None:
    counter = ErrorCounter(max_skipped_share=0.0)
    counter.record_read(5000)
    for _ in range(5000):
        counter.record_caption(ErrorCause.MISSING_CAPTION, "0.tar")
    counter.check()
    assert counter.num_skipped == 0


def test_many_shards_are_summed_up() -> None:
    counter = ErrorCounter(0.0)
    for number in range(5):
        counter.record_skipped(BROKEN, f"{number}.tar", "key")
    assert counter.summary().endswith("bad_image 5 in 0.tar (1), 1.tar (1), 2.tar (1) and 2 more shards")
