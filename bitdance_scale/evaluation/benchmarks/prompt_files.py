"""Published files of prompts as lines and rows: UTF-8 with or without a byte order mark, any line ends."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from bitdance_scale.errors import ConfigError
from bitdance_scale.text_files import read_utf8, split_lines


def read_text(path: Path | None, what: str) -> str:
    r"""The text of a file, its line ends as `\n`.

    Args:
        path: the file.
        what: the published file, for messages.

    Raises:
        ConfigError: none is named, or it cannot be read.
    """
    if path is None:
        raise ConfigError(f"no file of prompts is named; name {what}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name {what}")
    try:
        return read_utf8(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); name {what}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_json_lines(path: Path | None, what: str) -> list[dict[str, Any]]:
    """The objects of a file with one per line; the place of a line is its number, so no line may be empty.

    Raises:
        ConfigError: as `read_text`, or a line is no object; names it.
    """
    text = read_text(path, what)
    records = []
    for number, line in enumerate(split_lines(text.rstrip("\n")), 1):
        if not line.strip():
            raise ConfigError(f"{path}:{number}: is empty, and pictures have the numbers of their lines; name {what}")
        records.append(_object(f"{path}:{number}", line, what))
    return records


def read_json_object(path: Path | None, what: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ConfigError: as `read_text`, or it is no object, or has a key twice.
    """
    return _object(f"{path}", read_text(path, what), what)


def read_csv(path: Path | None, what: str) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV file with a header.

    Raises:
        ConfigError: as `read_text`, or a row has more or fewer cells than the header; names it.
    """
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: is no CSV ({error}); name {what}") from error
    if not rows:
        return [], []
    columns = rows[0][1]
    for number, row in rows[1:]:
        if len(row) != len(columns):
            raise ConfigError(f"{path}:{number}: has {len(row)} cells, the header {len(columns)}; name {what}")
    return columns, [dict(zip(columns, row, strict=True)) for _, row in rows[1:]]


def text_of(where: str, record: dict[str, Any], key: str, what: str) -> str:
    """The text that a record has for a key.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(record.get(key), str):
        found = f"{key} = {record[key]!r}" if key in record else f"has {', '.join(map(repr, record)) or 'nothing'}"
        raise ConfigError(f"{where}: {found}, expected a text {key!r}; name {what}")
    return record[key]


def _object(where: str, text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no such JSON ({error}); name {what}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: is {type(value).__name__}, expected an object; name {what}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} comes twice")
        found[key] = value
    return found
