from __future__ import annotations

import pytest

from tests.fake_cuda.device import why_not


@pytest.fixture(scope="session")
def fake_cuda() -> None:
    """Skips where there can be no fake device."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
