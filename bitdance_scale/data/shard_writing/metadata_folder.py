"""A folder with tables that name its pictures and say their captions, as Hugging Face's imagefolder has them."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bitdance_scale.atomic_files import is_storage_fault
from bitdance_scale.data.shard_writing.captions import Caption, caption_of_value
from bitdance_scale.data.shard_writing.columns import (
    CAPTION_COLUMNS,
    caption_column,
    file_name_column,
    numbers_of_texts,
    record_columns,
)
from bitdance_scale.data.shard_writing.parquet import read_rows
from bitdance_scale.data.shard_writing.picture_folder import PICTURE_EXTENSIONS, FoundFile, read_picture_file
from bitdance_scale.data.shard_writing.source import SkippedPicture, SourcePicture, digest_of
from bitdance_scale.errors import DataError, printable

TABLE_EXTENSIONS = ("jsonl", "csv", "parquet")
Row = dict[str, Any]


@dataclass(frozen=True)
class _Named:
    """A row of a table: which picture it names, from the folder on, and what it says."""

    name: str
    caption: Caption
    columns: Row


class MetadataFolder:
    """The pictures that tables in a folder name (a `PictureSource`), in the order of the rows.

    Args:
        folder: the folder.
        tables: paths of the tables from there; what a table names lies below its own folder.
        files: all that is in the folder, as `picture_folder.list_files` gives it.
        caption: column of the captions; empty: `text` or `caption`.
        image: column of the file names; empty: `file_name` or `*_file_name`.

    Raises:
        DataError: a table cannot be read or lacks a column.
    """

    kind = "folder with metadata"

    def __init__(
        self, folder: Path, tables: Sequence[str], files: list[FoundFile], caption: str = "", image: str = ""
    ) -> None:
        self._folder = folder
        self._rows = [row for table in tables for row in _named_rows(folder, table, caption, image)]
        sizes = {file.name: file.num_bytes for file in files}
        # macOS writes accents apart from their letters, in file names but not in tables.
        spelling = {unicodedata.normalize("NFC", name): name for name in sizes}
        self._names = [
            row.name if row.name in sizes else spelling.get(unicodedata.normalize("NFC", row.name), row.name)
            for row in self._rows
        ]
        self.num_bytes = np.array([max(sizes.get(name, 0), 0) for name in self._names], np.int64)
        named = {name: str(sizes.get(name, -1)) for name in sorted(self._names)}
        contents = ((folder / table).read_bytes() for table in tables)
        self.digest = digest_of([*tables, *contents, *(text for item in named.items() for text in item)])
        num_unnamed = sum(file.extension in PICTURE_EXTENSIONS and file.name not in named for file in files)
        self.left_out = {"pictures that no row names": num_unnamed} if num_unnamed else {}

    def can_start_at(self, position: int) -> bool:
        """Anywhere."""
        return True

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`."""
        for name, named in zip(self._names[start:stop], self._rows[start:stop], strict=True):
            yield SourcePicture(printable(name) or "(no name)", self._read(name), named.caption, named.columns)

    def without_caption(self) -> Iterator[str]:
        """The rows without a caption."""
        return (printable(row.name) for row in self._rows if row.caption.problem is not None)

    def _read(self, name: str) -> bytes | SkippedPicture:
        if not name:
            return SkippedPicture("missing_file", "the row names no file")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return SkippedPicture("missing_file", "the row names a file outside its folder")
        return read_picture_file(self._folder / name)


def _named_rows(folder: Path, table: str, caption: str, image: str) -> list[_Named]:
    path = folder / table
    columns, rows = _read_table(path, {caption, image})
    name_column = file_name_column(columns, image, str(path))
    text_column = caption_column(columns, caption, str(path))
    prefix = os.path.dirname(table)
    found = []
    for row in rows:
        name = row.get(name_column)
        name = name.replace("\\", "/").removeprefix("./") if isinstance(name, str) and _may_be_named(name) else ""
        is_below = bool(name) and not name.startswith("/")
        name = f"{prefix}/{name}" if prefix and is_below else name
        found.append(
            _Named(name, caption_of_value(row.get(text_column)), record_columns(row, name_column, text_column))
        )
    return found


def _may_be_named(name: str) -> bool:
    """Whether a file may have a name; JSON can contain lone surrogates and zero bytes, which no name has."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _read_table(path: Path, texts: set[str]) -> tuple[list[str], list[Row]]:
    """Columns in their order, and rows; `texts` are columns of a CSV that hold no numbers, whatever they look like."""
    extension = path.suffix[1:].lower()
    if extension == "parquet":
        return read_rows(path)
    try:
        return _read_csv(path, texts) if extension == "csv" else _read_jsonl(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from error
    except OSError as error:
        if is_storage_fault(error):
            raise
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it, or move it away") from error


def _read_csv(path: Path, texts: set[str]) -> tuple[list[str], list[Row]]:
    # A caption may be longer than the 128 kB that the csv module takes by default.
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = [line for line in csv.reader(file, strict=True) if line]
        except csv.Error as error:
            raise DataError(f"{path}: is no valid CSV ({error}); quote cells that hold commas or quotes") from error
    if not lines:
        raise DataError(f"{path}: is empty; its first line names the columns")
    columns = lines[0]
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}: two columns have the same name ({', '.join(columns)}); rename one")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise DataError(
                f"{path}: row {number} has {len(line)} cells, the first line names {len(columns)} columns; quote cells "
                "that hold commas or line ends"
            )
    cells: dict[str, list[Any]] = {}
    for place, name in enumerate(columns):
        values = [line[place] for line in lines[1:]]
        is_text = name in texts or name.lower() in CAPTION_COLUMNS or name.endswith("file_name")
        cells[name] = values if is_text else numbers_of_texts(values)
    return columns, [dict(zip(columns, values, strict=True)) for values in zip(*cells.values(), strict=True)]


def _read_jsonl(path: Path) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows = []
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is no JSON ({error}); every line holds one object") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} holds no JSON object; every line holds one")
            columns |= dict.fromkeys(row)
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: is empty; every line holds one JSON object")
    return list(columns), rows
