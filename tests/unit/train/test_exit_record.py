"""The exit code that a launcher reads."""

from __future__ import annotations

import pytest

from bitdance_scale.cli.stage import main
from bitdance_scale.train.process import EXIT_RECORD, EXIT_REFUSED

DEMO = "demo"


@pytest.mark.parametrize(("override", "code"), [("run.stepz=3", EXIT_REFUSED), ("run.steps=3", 0)])
def test_first_rank_leaves_the_code(override, code, tmp_path, monkeypatch, capsys):
    record = tmp_path / "exit_code"
    monkeypatch.setenv(EXIT_RECORD, str(record))
    monkeypatch.setenv("RANK", "1")
    assert main("pt", [DEMO, override, "--print-config"]) == code
    assert not record.exists()
    monkeypatch.setenv("RANK", "0")
    assert main("pt", [DEMO, override, "--print-config"]) == code
    assert record.read_text() == f"{code}\n"


def test_nobody_asks_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(EXIT_RECORD, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main("pt", [DEMO, "--print-config"]) == 0
    assert list(tmp_path.iterdir()) == []
