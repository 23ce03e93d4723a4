"""A small published folder, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdance_scale.generate.published_model import PublishedModel, load_published
from tests.released import write_published


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def model(published: Path) -> PublishedModel:
    return load_published(published, torch.float32, torch.device("cpu"))
