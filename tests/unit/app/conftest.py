"""A drawer without a network, and a folder for its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitdance_scale.app.history import PictureFolder
from tests.unit.app.fake_drawer import FakeDrawer


@pytest.fixture
def drawer(tmp_path: Path) -> FakeDrawer:
    return FakeDrawer(tmp_path / "ae")


@pytest.fixture
def folder() -> Iterator[PictureFolder]:
    with PictureFolder() as made:
        yield made
