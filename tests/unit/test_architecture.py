"""The house rules that a program can check; the layers and the homes of third parties are in pyproject.toml."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("bitdance_scale", "cluster", "pipelines", "tools", "tests")
    for path in (ROOT / folder).rglob("*.py")
]
MAX_LINES = 500
MAX_MEDIAN_LINES = 180
MAX_ENTRY_POINT_LINES = 60
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_imports_keep_the_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # import-linter finds the package through the working directory, as its command line does.
    monkeypatch.chdir(ROOT)
    try:
        status = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    finally:
        # It configures logging for a command line, which silences every logger that exists.
        for logger in logging.root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger):
                logger.disabled = False
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_every_folder_of_the_package_is_linted() -> None:
    # A folder without __init__.py is invisible to import-linter.
    folders = {path.parent for path in (ROOT / "bitdance_scale").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): num_lines(path) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    package = [length for name, length in lengths.items() if name.startswith("bitdance_scale")]
    assert statistics.median(package) <= MAX_MEDIAN_LINES


def test_entry_points_only_enter() -> None:
    lengths = {path.name: num_lines(path) for path in (ROOT / "pipelines").glob("*.py")}
    assert lengths
    assert {name: length for name, length in lengths.items() if length >= MAX_ENTRY_POINT_LINES} == {}


def test_names_say_what_is_inside() -> None:
    assert [str(path) for path in SOURCES if path.name in VAGUE_NAMES] == []
