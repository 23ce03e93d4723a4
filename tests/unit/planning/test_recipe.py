"""Which configurations are the stages of a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.errors import ConfigError
from bitdance_scale.planning.recipe import recipe_configs


@pytest.mark.parametrize("name", ["pt_14b", "sft_14b"])
def test_any_stage_names_its_recipe(name):
    assert recipe_configs(name) == ["pt_14b", "ct_14b", "sft_14b", "distill_14b"]


def test_pretraining_may_have_the_name_of_the_recipe():
    assert recipe_configs("demo") == ["demo", "ct_demo", "sft_demo", "distill_demo"]


def test_own_files_lie_beside_each_other(tmp_path: Path):
    for stage in ("pt", "ct", "sft"):
        shutil.copy(CONFIGS / f"{stage}_14b.toml", tmp_path / f"{stage}_own.toml")
    own = str(tmp_path / "ct_own.toml")
    with pytest.raises(ConfigError, match="beside no distill_own.toml"):
        recipe_configs(own)
    shutil.copy(CONFIGS / "distill_14b.toml", tmp_path / "distill_own.toml")
    assert [Path(name).stem for name in recipe_configs(own)] == ["pt_own", "ct_own", "sft_own", "distill_own"]
