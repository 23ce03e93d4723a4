from __future__ import annotations

import pytest

from bitdance_scale.wording import file_size, first_few


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (12_345, "12.3 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (4_700_000, "4.70 MB"),
        (178_000_000, "178 MB"),
        (1_760_000_000, "1.76 GB"),
        (29_500_000_000, "29.5 GB"),
        (4_200_000_000_000, "4.20 TB"),
        (12_345_000_000_000_000, "12345 TB"),
    ],
)
def test_a_size_has_three_significant_digits(num_bytes: int, text: str) -> None:
    assert file_size(num_bytes) == text


def test_a_long_list_is_cut() -> None:
    assert first_few(["a", "b", "c"]) == "a; b; c"
    assert first_few(list("abcdefghij")) == "a; b; c; and 7 more"
