"""The house rules that a program can check; the layers and the homes of third parties are in pyproject.toml."""

from __future__ import annotations

import ast
import logging
import re
import statistics
import subprocess
from collections.abc import Iterator
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


# `archive` is what a `zipfile.ZipFile` is called: its members are bytes.
OF_OTHER_LIBRARIES = {"os", "tarfile", "gzip", "Image", "archive"}


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


def test_make_help_has_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (declared,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    # Files, such as stamps, are named by variables.
    assert {*declared.split()} == {*re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE)}
    printed = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "help"], check=True, capture_output=True, encoding="utf-8"
    ).stdout
    lines = [line.split(maxsplit=2) for line in printed.splitlines()]
    assert all(command == "make" and meaning for command, _, meaning in lines)
    assert sorted(target for _, target, _ in lines) == sorted(declared.split())


def places_in_the_locales_encoding(source: str) -> Iterator[int]:
    """Lines that read or write text without saying that it is UTF-8: files, and the output of other programs."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, options = node.func, {option.arg: option.value for option in node.keywords}
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        is_method = isinstance(function, ast.Attribute)
        owner = ast.unparse(function.value) if is_method else ""
        if "encoding" in options or owner in OF_OTHER_LIBRARIES:
            continue
        if name == "open":
            position = 0 if is_method else 1
            mode = node.args[position] if len(node.args) > position else options.get("mode", ast.Constant("r"))
            is_text = not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        else:
            is_output = owner == "subprocess" and bool({"text", "universal_newlines"} & options.keys())
            is_text = is_output or (is_method and name in ("read_text", "write_text"))
        if is_text or name == "FileHandler":
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='a')", True),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("subprocess.run(command, text=True)", True),
        ("logging.FileHandler(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('xb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("write_text(path, text)", False),
        ("tarfile.open(path)", False),
        ("subprocess.run(command)", False),
    ],
)
def test_text_without_an_encoding_is_found(source: str, is_found: bool) -> None:
    assert bool(list(places_in_the_locales_encoding(source))) == is_found


def test_text_is_utf8_in_every_locale() -> None:
    # A prompt in Chinese must be written and read under any locale of a cluster.
    folders = ("bitdance_scale", "cluster", "pipelines", "tools", "benchmarks")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for line in places_in_the_locales_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_tensorboard_has_one_home() -> None:
    # It comes through torch, of which import-linter sees the name alone.
    imports = ("utils.tensorboard", "utils import tensorboard", "import tensorboard\n")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bitdance_scale").rglob("*.py")}
    users = [name for name, source in sources.items() if any(words in source for words in imports)]
    assert users == ["tensorboard_sink.py"]
