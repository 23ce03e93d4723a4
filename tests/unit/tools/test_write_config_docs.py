from __future__ import annotations

from pathlib import Path

import pytest
import write_config_docs

from bitdance_scale.config.describe import setting_docs
from bitdance_scale.config.schema import RunConfig


def test_generated_pages_are_current() -> None:
    outdated = [
        path.name for path, text in write_config_docs.pages().items() if path.read_text(encoding="utf-8") != text
    ]
    assert outdated == [], f"run {write_config_docs.COMMAND}"


def test_page_has_every_setting() -> None:
    num_rows = sum(
        line.startswith("| `") for line in write_config_docs.config_page().split("## Presets")[0].splitlines()
    )
    assert num_rows == len(list(setting_docs(RunConfig)))


def test_tables_keep_their_columns() -> None:
    for text in write_config_docs.pages().values():
        for table in [block for block in text.split("\n\n") if block.startswith("|")]:
            assert len({row.replace("\\|", "").count("|") for row in table.splitlines()}) == 1, table


def test_check_reports_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_config_docs, "DOCS", tmp_path)
    assert write_config_docs.main(["--check"]) == 1
    assert "config.md, rules.md" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert write_config_docs.main([]) == 0
    assert write_config_docs.main(["--check"]) == 0
