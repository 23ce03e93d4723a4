"""Messages of errors can be printed, stored and sent, whatever they name."""

from __future__ import annotations

import pickle

import pytest

from bitdance_scale.errors import BitDanceError, DataError, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, größe, 日本, 🐕", "plain, größe, 日本, 🐕"),
        # As Python reads the bytes of a Latin-1 name; the first and the last that can be.
        (b"caf\xe9/\x80\xff.tar".decode("utf-8", "surrogateescape"), r"caf\xe9/\x80\xff.tar"),
        # As JSON may have them.
        ("\ud800 \udc00 \udfff", r"\ud800 \udc00 \udfff"),
    ],
)
def test_what_utf8_cannot_say_becomes_escapes(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    message = str(DataError(f"{text}: cannot be read"))
    assert message == f"{expected}: cannot be read" and message.encode("utf-8")


def test_errors_travel_between_ranks_as_they_are() -> None:
    error = pickle.loads(pickle.dumps(DataError("caf\udce9")))
    assert isinstance(error, BitDanceError) and str(error) == r"caf\xe9"
