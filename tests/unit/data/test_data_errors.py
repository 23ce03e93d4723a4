"""The fault ledger: counts by cause and shard, and the stop."""

from __future__ import annotations

import pytest

from bitdance_scale.data.data_errors import ErrorCause, ErrorCounter, SampleError
from bitdance_scale.errors import DataError

BROKEN = SampleError(ErrorCause.BAD_IMAGE, "image file is truncated")


def test_stops_past_the_share_and_names_the_shards() -> None:
    ledger = ErrorCounter(max_skipped_share=0.002)
    ledger.record_read(999)
    for number in range(3):
        ledger.record_skipped(BROKEN, f"{number % 2}.tar", f"key{number}")
    ledger.record_caption(ErrorCause.EMPTY_CAPTION, "0.tar")
    ledger.check()
    ledger.record_read()
    with pytest.raises(DataError) as stopped:
        ledger.check()
    message = str(stopped.value)
    assert "3 of 1000 samples could not be used; bad_image 3 in 0.tar (2), 1.tar (1); empty_caption 1 in" in message
    assert "data.max_skipped_share=0.002" in message
    assert "Latest: 0.tar: sample key2: bad_image: image file is truncated" in message
    ledger.record_read(500)
    ledger.check()
    assert ledger.counts() == {"bad_image": {"0.tar": 2, "1.tar": 1}, "empty_caption": {"0.tar": 1}}


def test_captions_are_no_holes() -> None:
    ledger = ErrorCounter(max_skipped_share=0.0)
    ledger.record_read(5000)
    for _ in range(5000):
        ledger.record_caption(ErrorCause.MISSING_CAPTION, "0.tar")
    ledger.check()
    assert ledger.num_skipped == 0


def test_many_shards_are_summed_up() -> None:
    ledger = ErrorCounter(0.0)
    for number in range(5):
        ledger.record_skipped(BROKEN, f"{number}.tar", "key")
    assert ledger.summary().endswith("bad_image 5 in 0.tar (1), 1.tar (1), 2.tar (1) and 2 more shards")
