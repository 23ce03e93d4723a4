"""The names of a run's classes stay with it."""

from __future__ import annotations

import pytest

from bitdance_scale.config.schema import ClassesSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.class_names import keep_class_names


def test_a_resumed_run_has_its_classes(tmp_path):
    run, section = tmp_path / "run", ClassesSection(num_classes=2, map=str(tmp_path / "map"))
    keep_class_names(run, ClassesSection(num_classes=2), is_resumed=False)
    assert not run.exists()
    (tmp_path / "map").write_text("cat\ndog\n")
    # The first attempt had another map and came to no checkpoint.
    (run / "classes.txt").parent.mkdir()
    (run / "classes.txt").write_text("dog\ncat\n")
    keep_class_names(run, section, is_resumed=False)
    assert (run / "classes.txt").read_text() == "cat\ndog\n"
    (tmp_path / "map").write_text('{"dog": 1, "cat": 0}')
    keep_class_names(run, section, is_resumed=True)
    (tmp_path / "map").write_text("cat\ncow\n")
    with pytest.raises(ConfigError, match=r"class 1 is 'cow', and 'dog' in .*classes\.txt"):
        keep_class_names(run, section, is_resumed=True)
    (tmp_path / "map").write_text("cat\n")
    with pytest.raises(ConfigError, match=r"class 1 is no class, and 'dog' in .*classes\.txt"):
        keep_class_names(run, ClassesSection(num_classes=1, map=str(tmp_path / "map")), is_resumed=True)
