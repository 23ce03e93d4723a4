"""A run folder keeps every configuration that it was trained with."""

from __future__ import annotations

from bitdance_scale.train.config_file import write_config


def test_an_earlier_configuration_is_kept_under_the_step_that_ended_it(tmp_path):
    write_config(tmp_path, "[optim]\nlr = 0.002\n", 0)
    write_config(tmp_path, "[optim]\nlr = 0.0005\n", 300)
    # Started again at the same step, before anything was trained: that configuration trained nothing.
    write_config(tmp_path, "[optim]\nlr = 0.1\n", 300)
    assert (tmp_path / "config.toml").read_text() == "[optim]\nlr = 0.1\n"
    assert (tmp_path / "config.step_000300.toml").read_text() == "[optim]\nlr = 0.002\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_settings_and_those_of_step_0_are_not_kept(tmp_path):
    write_config(tmp_path, "[optim]\nlr = 0.002\n", 0)
    write_config(tmp_path, "[optim]\nlr = 0.003\n", 0)
    write_config(tmp_path, "# as before\n[optim]\nlr = 0.003\n", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_damaged_one_is_kept_as_it_is(tmp_path):
    (tmp_path / "config.toml").write_bytes(b"\xff = ")
    write_config(tmp_path, "[run]\n", 7)
    assert (tmp_path / "config.step_000007.toml").read_bytes() == b"\xff = "
