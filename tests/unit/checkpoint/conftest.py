from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from tests.released import write_published


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A published folder."""
    return write_published(tmp_path_factory.mktemp("released") / "published")


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory) -> Path:
    """The import of the published folder."""
    out = tmp_path_factory.mktemp("imported") / "run"
    import_release(open_source(published, None), out)
    return out
