import pytest

from tests.unit.evaluation.geneval.small_networks import save_clip, save_mask2former


@pytest.fixture(scope="session")
def mask2former_folder(tmp_path_factory):
    return save_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))
