"""What becomes of the other shards when some cannot be encoded."""

from __future__ import annotations

from collections.abc import Container

import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.train.encode_bits import encode_rows


class Encoder:
    """Stands in for the encoder and its stop: some shards cannot be read, and one brings a stop."""

    def __init__(self, broken: Container[int], stops_after: int = -1) -> None:
        self.broken, self.stops_after = broken, stops_after
        self.tried: list[int] = []
        self.is_requested = False

    def encode(self, row: int) -> None:
        self.tried.append(row)
        self.is_requested = row == self.stops_after
        if row in self.broken:
            raise DataError(f"{row:06d}.tar: cannot be read")


def test_a_shard_that_fails_leaves_the_others_to_be_made(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder({4, 10})
    assert encode_rows(encoder, [1, 4, 7, 10, 13], 1, encoder) == [
        "000004.tar: cannot be read",
        "000010.tar: cannot be read",
    ]
    assert encoder.tried == [1, 4, 7, 10, 13]
    # When it happens, and not at the end.
    failed = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert failed[0] == "rank 1: 2 of 5 shards, failed: 000004.tar: cannot be read"


def test_when_many_fail_the_rest_is_not_tried() -> None:
    encoder = Encoder(range(100))
    assert len(encode_rows(encoder, range(100), 0, encoder)) == len(encoder.tried) == 10


def test_a_stop_leaves_the_rest() -> None:
    encoder = Encoder({1}, stops_after=2)
    assert len(encode_rows(encoder, range(5), 0, encoder)) == 1
    assert encoder.tried == [0, 1, 2]
