"""Pictures inside Parquet files, as data sets on the Hugging Face Hub have them; and tables in Parquet.

This is the only file that imports pyarrow, which is an optional dependency. A picture is a binary cell, or a struct of
`bytes` and `path`. Rows are read a few at a time, in the order of the files and rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bitdance_scale.atomic_files import is_storage_fault
from bitdance_scale.data.shard_writing.captions import caption_of_value
from bitdance_scale.data.shard_writing.columns import caption_column, record_columns
from bitdance_scale.data.shard_writing.source import SkippedPicture, SourcePicture, digest_of
from bitdance_scale.errors import DataError, printable

_ROWS_AT_ONCE = 8
# A row group of this size is read from its start only, once for all its shards.
_LARGE_GROUP_BYTES = 256 << 20


def read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a table without pictures.

    Raises:
        DataError: it is no Parquet, or pyarrow is not installed.
    """
    with _open(path) as file:
        table = file.read()
    return list(table.column_names), table.to_pylist()


class ParquetPictures:
    """The pictures in Parquet files (a `PictureSource`).

    Args:
        root: folder from which the names of files are told.
        paths: the files, in order.
        caption: column of the captions; empty: `text` or `caption`.
        image: column of the pictures; empty: the only one that can be it.

    Raises:
        DataError: a file is no Parquet, has no such column or other columns than the first one; or pyarrow is not
            installed.
    """

    kind = "Parquet files"

    def __init__(self, root: Path, paths: Sequence[Path], caption: str = "", image: str = "") -> None:
        self.left_out: dict[str, int] = {}
        self._root, self._paths = root, list(paths)
        self._groups: list[_Group] = []
        sizes: list[np.ndarray] = []
        parts: list[str] = []
        start = 0
        for number, path in enumerate(self._paths):
            with _open(path) as file:
                columns = list(file.schema_arrow.names)
                if not number:
                    self._image = _image_column(file.schema_arrow, image, path)
                    self._caption = caption_column(columns, caption, str(path))
                for column in (self._image, self._caption):
                    if column not in columns:
                        raise DataError(
                            f"{path}: has no column {column!r}, which {self._paths[0]} has; pack files with other "
                            f"columns into a folder of their own. The columns are {', '.join(columns)}"
                        )
                for group in range(file.metadata.num_row_groups):
                    num_rows, num_bytes = _group_size(file.metadata.row_group(group), self._image)
                    self._groups.append(_Group(number, group, start, num_rows, num_bytes))
                    sizes.append(np.full(num_rows, num_bytes // max(num_rows, 1), np.int64))
                    start += num_rows
                    parts += [str(num_rows), str(num_bytes)]
            parts += [path.relative_to(root).as_posix(), str(path.stat().st_size)]
        self.num_bytes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self.digest = digest_of([self._image, self._caption, *parts])
        self._starts = np.array([group.start for group in self._groups], np.int64)

    def can_start_at(self, position: int) -> bool:
        """At the start of a row group, and inside a small one, of which little is read for nothing."""
        group = self._groups[int(np.searchsorted(self._starts, position, "right")) - 1]
        return position == group.start or group.num_bytes < _LARGE_GROUP_BYTES

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`."""
        for group in self._groups:
            if group.start < stop and start < group.stop:
                yield from self._of_group(group, max(start - group.start, 0), min(stop, group.stop) - group.start)

    def without_caption(self) -> Iterator[str]:
        """None is known: the columns are read with the pictures."""
        return iter(())

    def _of_group(self, group: _Group, first: int, end: int) -> Iterator[SourcePicture]:
        path = self._paths[group.file]
        first_row = group.start_in_file(self._groups)
        row = 0
        with _open(path) as file:
            try:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group.number], use_threads=False):
                    skipped = max(first - row, 0)
                    if skipped < batch.num_rows:
                        for place, cells in enumerate(batch.slice(skipped).to_pylist(), start=row + skipped):
                            if place == end:
                                return
                            yield self._picture(path, first_row + place, cells)
                    row += batch.num_rows
            except (_pyarrow().lib.ArrowException, OSError) as error:
                if is_storage_fault(error):
                    raise
                raise DataError(f"{path}: row group {group.number} cannot be read ({error}); fetch it again") from error

    def _picture(self, path: Path, row: int, cells: dict[str, Any]) -> SourcePicture:
        cell = cells[self._image]
        name = f"{printable(path.relative_to(self._root).as_posix())}#{row}"
        content: bytes | SkippedPicture
        if isinstance(cell, dict):
            columns = {"file_name": cell["path"]} if isinstance(cell.get("path"), str) else {}
            cell = cell.get("bytes")
        else:
            columns = {}
        content = cell if isinstance(cell, bytes) else SkippedPicture("missing_file", "the row holds no bytes")
        columns |= record_columns(cells, self._image, self._caption)
        return SourcePicture(name, content, caption_of_value(cells[self._caption]), columns)


class _Group:
    """A row group: file, number in it, place of its first row among all rows, rows, bytes of its pictures."""

    def __init__(self, file: int, number: int, start: int, num_rows: int, num_bytes: int) -> None:
        self.file, self.number, self.start, self.num_rows, self.num_bytes = file, number, start, num_rows, num_bytes

    @property
    def stop(self) -> int:
        return self.start + self.num_rows

    def start_in_file(self, groups: Sequence[_Group]) -> int:
        return self.start - next(group.start for group in groups if group.file == self.file)


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading Parquet needs pyarrow, which is not installed: pip install 'bitdance_scale[pack]', or pip install "
            "pyarrow"
        ) from error
    return pyarrow


def _open(path: Path) -> Any:
    """An open `pyarrow.parquet.ParquetFile`; its pages are mapped, and read when they are needed."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.lib.ArrowException, OSError) as error:
        # pyarrow raises OSErrors for damaged pages too.
        if is_storage_fault(error):
            raise
        raise DataError(f"{path}: is no readable Parquet ({error}); fetch it again or leave it out") from error


def _group_size(group: Any, image: str) -> tuple[int, int]:
    """Rows of a row group, and bytes of its pictures."""
    columns = (group.column(place) for place in range(group.num_columns))
    num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image)
    return group.num_rows, num_bytes


def _image_column(schema: Any, wanted: str, path: Path) -> str:
    names = list(schema.names)
    found = [name for name in names if _holds_bytes(schema.field(name).type)]
    if wanted:
        if wanted not in found:
            raise DataError(
                f"{path}: column {wanted!r} holds no pictures: it must be binary, or a struct with `bytes`. The "
                f"columns that could be it: {', '.join(found) or 'none'}"
            )
        return wanted
    if not found:
        hint = ""
        if any(name.lower() == "url" for name in names):
            hint = "This is a list of addresses: download it with img2dataset (docs/from_nothing_to_shards.md). "
        raise DataError(
            f"{path}: no column holds pictures (binary, or a struct with `bytes`). {hint}The columns are "
            f"{', '.join(names)}"
        )
    if len(found) > 1:
        raise DataError(f"{path}: the columns {' and '.join(found)} all hold bytes; name one with --image COLUMN")
    return found[0]


def _holds_bytes(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))
