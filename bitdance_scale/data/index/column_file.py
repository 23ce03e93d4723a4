"""Columns of numbers in one safetensors file, written piece by piece and mapped into memory.

The map is told that reads are random. Otherwise the system would read 128 KB and more around every row. Before a range
or many rows are read, their pages are asked for all at once, so that they do not come one after the other.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bitdance_scale.atomic_files import replacing

HEADER = "header"
"""Name of the header among the digests of a file."""
Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Column -> dtype and shape."""
_DTYPE_NAMES = {"I64": np.int64, "U32": np.uint32, "F32": np.float32, "U16": np.uint16, "U8": np.uint8}
_NAMES_OF_DTYPES = {np.dtype(dtype): name for name, dtype in _DTYPE_NAMES.items()}
_LENGTH_BYTES = 8
_COPY_BYTES = 16 << 20
_MIN_PREFETCH_ROWS = 16


class ColumnFile:
    """The columns of a file, mapped; one descriptor is open for it.

    Args:
        path: the file.

    Attributes:
        columns: the arrays by name; read only.
        metadata: what else the file says, JSON values.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no such file, or it is cut.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            num_bytes = os.fstat(file.fileno()).st_size
            if not 0 < length < num_bytes:
                raise ValueError(f"{path.name}: no columns, its header would have {length} bytes")
            header = json.loads(file.read(length))
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._content.madvise(mmap.MADV_RANDOM)
        self._address = np.frombuffer(self._content, np.uint8).ctypes.data
        self.metadata: Mapping[str, Any] = json.loads(header.pop("__metadata__")["bitdance"])
        self.columns: dict[str, np.ndarray] = {}
        start, stop = _LENGTH_BYTES + length, 0
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPE_NAMES[entry["dtype"]]), tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
            if start + stop > num_bytes or stop - begin != dtype.itemsize * math.prod(shape):
                raise ValueError(f"{path.name}: column {name} reaches past the end of the file: it was cut")
            self.columns[name] = np.frombuffer(self._content, dtype, math.prod(shape), start + begin).reshape(shape)
        if start + stop != num_bytes:
            raise ValueError(f"{path.name}: {num_bytes} bytes, its header says {start + stop}")

    def ask_for_rows(self, column: np.ndarray, rows: slice | np.ndarray) -> None:
        """Asks for the pages of rows of one of `columns`."""
        if not len(column):
            return
        row_bytes = column.strides[0]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(column))
            if stop > start:
                self.ask_for(column, np.array([start * row_bytes]), np.array([stop * row_bytes]))
        elif len(rows) >= _MIN_PREFETCH_ROWS:
            self.ask_for(column, rows * row_bytes, (rows + 1) * row_bytes)

    def ask_for(self, column: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Tells the system that ranges of the bytes of a column will be read; at least one, each page once, in order.

        Args:
            column: one of `columns`.
            begins: int64 [n], first byte of each range.
            ends: int64 [n], the byte after the last.
        """
        start = column.ctypes.data - self._address
        first = (start + begins) // mmap.PAGESIZE
        last = (start + np.maximum(ends, begins + 1) - 1) // mmap.PAGESIZE
        order = np.argsort(first, kind="stable")
        first, reached = (
            first[order],
            np.maximum.accumulate(np.minimum(last[order], len(self._content) // mmap.PAGESIZE)),
        )
        # Ranges that share a page, or are neighbours, are asked for as one.
        is_new = np.append(True, first[1:] > reached[:-1] + 1)
        stops = reached[np.append(is_new[1:], True)]
        for page, stop in zip(first[is_new].tolist(), stops.tolist(), strict=True):
            start_byte = page * mmap.PAGESIZE
            num_bytes = min((stop + 1) * mmap.PAGESIZE, len(self._content)) - start_byte
            if num_bytes > 0:
                self._content.madvise(mmap.MADV_WILLNEED, start_byte, num_bytes)


def write_columns(path: Path, columns: Mapping[str, np.ndarray], metadata: Any) -> dict[str, str]:
    """Writes columns that are in memory; returns column -> digest.

    Raises:
        OSError: of the file system; nothing is left behind.
    """
    with replacing(path, is_shared=True) as writing, open(writing, "wb") as file:
        shapes = {name: (values.dtype, values.shape) for name, values in columns.items()}
        writer = ColumnWriter(file.fileno(), shapes, metadata)
        for name, values in columns.items():
            writer.append(name, values)
    return writer.digests()


class ColumnWriter:
    """Fills the columns of a new file, each from its beginning, in any order of the columns.

    Args:
        descriptor: the file, empty.
        shapes: its columns.
        metadata: what else the file says, JSON values.
    """

    def __init__(self, descriptor: int, shapes: Shapes, metadata: Any) -> None:
        entries: dict[str, Any] = {"__metadata__": {"bitdance": json.dumps(metadata)}}
        stop = 0
        # The widest first, so that every column is aligned.
        for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
            start, stop = stop, stop + dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": _NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self._descriptor = descriptor
        self._places = {name: len(head) + entries[name]["data_offsets"][0] for name in shapes} | {HEADER: 0}
        self._dtypes = {name: dtype for name, (dtype, _) in shapes.items()}
        self._hashes = {name: xxhash.xxh3_128() for name in (HEADER, *shapes)}
        self._write(HEADER, memoryview(head))

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds values to a column."""
        self._write(name, np.ascontiguousarray(values, self._dtypes[name]).reshape(-1).view(np.uint8).data)

    def digests(self) -> dict[str, str]:
        """Column -> digest of what was written."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def _write(self, name: str, content: memoryview) -> None:
        self._hashes[name].update(content)
        while len(content):
            written = os.pwrite(self._descriptor, content, self._places[name])
            self._places[name] += written
            content = content[written:]


def digests_of(path: Path) -> dict[str, str]:
    """Column -> digest of what a file holds now, as `ColumnWriter.digests` gave it.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_LENGTH_BYTES)
        head += file.read(min(int.from_bytes(head, "little"), os.fstat(file.fileno()).st_size))
        # A damaged header must not be understood first: its digest says that it is damaged.
        found = {HEADER: xxhash.xxh3_128_hexdigest(head)}
        try:
            header = json.loads(head[_LENGTH_BYTES:])
            spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return found
        for name, (begin, end) in spans.items():
            digest = xxhash.xxh3_128()
            file.seek(len(head) + begin)
            left = end - begin
            while left > 0 and (block := file.read(min(left, _COPY_BYTES))):
                digest.update(block)
                left -= len(block)
            found[name] = digest.hexdigest()
    return found
