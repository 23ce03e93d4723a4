r"""A segment: the samples of some consecutive shards, in columns, in one safetensors file that is mapped into memory.

An index is a list of segments. A shard that is new or has changed costs its own segment and no other, and an open index
needs one descriptor per segment. The columns of n samples are

    place         uint32 [n, 3]   of the image: first block of 512 bytes, length in bytes, checksum
    size_px       uint16 [n, 2]   (height, width) of the picture, upright
    original_px   uint16 [n, 2]   (height, width) before img2dataset resized it; 0: not known
    score.FIELD   float32 [n]     a number of the record; NaN: none
    TEXT.base     int64           \\
    TEXT.start    uint32 [n + 1]   > texts one after the other: where each begins, and its status (two bits)
    TEXT.text     uint8           /

where TEXT is `name` (key in the shard) or `caption.SOURCE`. A text begins at base + start, with one base for every
`GROUP` samples. That takes 4 bytes a sample, and a text is found with one page of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.atomic_files import replacing
from bitdance_scale.data.index.column_file import ColumnFile, ColumnWriter, Shapes

GROUP = 512
"""Samples with one base of their texts. Texts have at most 1 MiB, so a start needs at most 29 bits."""
FIXED_COLUMNS: Mapping[str, tuple[type, int]] = {
    "place": (np.uint32, 3),
    "size_px": (np.uint16, 2),
    "original_px": (np.uint16, 2),
}
"""Column -> dtype and numbers per sample."""
SCORE = "score."
_GROUP_BITS = GROUP.bit_length() - 1
_STATUS_BITS = 30
_START_MASK = np.uint32((1 << _STATUS_BITS) - 1)
_PARTS = (".base", ".start", ".text")


class Segment:
    """Columns of n samples, in memory or mapped from a file.

    Args:
        columns: as in the docstring of the module.
        file: the file that they are mapped from; None: they are in memory.

    Attributes:
        num_samples: n.
        columns: the arrays by name; read only.
        metadata: what else the file says.
        scores: fields that have a column.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], file: ColumnFile | None = None) -> None:
        self.columns = columns
        self.metadata: Mapping[str, Any] = file.metadata if file is not None else {}
        self.num_samples = len(columns["size_px"])
        self.scores = tuple(name.removeprefix(SCORE) for name in columns if name.startswith(SCORE))
        self._file = file

    @classmethod
    def of_file(cls, path: Path) -> Segment:
        """Maps a file.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is no segment, or it is cut.
        """
        file = ColumnFile(path)
        if not {*FIXED_COLUMNS} <= {*file.columns}:
            raise ValueError(f"{path.name}: holds the columns {', '.join(file.columns)}, which are no segment")
        return cls(file.columns, file)

    def values(self, column: str, rows: slice | np.ndarray) -> np.ndarray:
        """Rows of a column; NaN of a score that no sample of the segment has."""
        if column.startswith(SCORE) and column not in self.columns:
            count = len(range(*rows.indices(self.num_samples))) if isinstance(rows, slice) else len(rows)
            return np.full(count, np.nan, np.float32)
        array = self.columns[column]
        if self._file is not None:
            self._file.ask_for_rows(array, rows)
        return array[rows]

    def status(self, text: str, rows: slice | np.ndarray) -> np.ndarray:
        """uint8 [n], status of texts."""
        if isinstance(rows, slice):
            # The last start belongs to no sample.
            rows = slice(*rows.indices(self.num_samples))
        return (self.values(f"{text}.start", rows) >> np.uint32(_STATUS_BITS)).astype(np.uint8)

    def read_texts(self, text: str, rows: np.ndarray) -> list[bytes]:
        """The texts of some rows, int64 [n]."""
        begins, ends = self._starts(text, rows), self._starts(text, rows + 1)
        content = self.columns[f"{text}.text"]
        if self._file is not None and len(rows) > 1:
            self._file.ask_for(content, begins, ends)
        spans = zip(begins.tolist(), ends.tolist(), strict=True)
        return [content[begin:end].tobytes() for begin, end in spans]

    def text_lengths(self, text: str, rows: slice) -> np.ndarray:
        """int64 [n], bytes of each text."""
        start, stop, _ = rows.indices(self.num_samples)
        return np.diff(self._starts(text, slice(start, stop + 1)))

    def joined(self, text: str, rows: slice) -> np.ndarray:
        """uint8, the texts of consecutive rows, one after the other."""
        start, stop, _ = rows.indices(self.num_samples)
        begin, end = self._starts(text, np.array([start, stop])).tolist()
        return self.values(f"{text}.text", slice(begin, end))

    def _starts(self, text: str, rows: slice | np.ndarray) -> np.ndarray:
        starts = self.values(f"{text}.start", rows) & _START_MASK
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return self.columns[f"{text}.base"][numbers >> _GROUP_BITS] + starts


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of a segment file, such as those of one shard.

    Attributes:
        path: the file.
        start: the first of the samples.
        stop: the sample after the last.
    """

    path: Path
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The samples as a slice."""
        return slice(self.start, self.stop)


def text_columns(text: str, lengths: np.ndarray, status: np.ndarray, joined: bytes) -> dict[str, np.ndarray]:
    """The three columns of a text.

    Args:
        text: its name.
        lengths: int64 [n], bytes of each text.
        status: uint8 [n], 0 .. 3.
        joined: the texts, one after the other.
    """
    absolute = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    base = absolute[::GROUP].copy()
    found = (base, _relative(absolute, base, 0, status), np.frombuffer(joined, np.uint8))
    return {text + part: values for part, values in zip(_PARTS, found, strict=True)}


def _relative(absolute: np.ndarray, base: np.ndarray, first: int, status: np.ndarray) -> np.ndarray:
    """uint32, starts of rows `first` .. relative to the base of their group, with the status in the upper bits."""
    rows = np.arange(first, first + len(absolute))
    starts = (absolute - base[rows >> _GROUP_BITS]).astype(np.uint32)
    starts[: len(status)] |= status.astype(np.uint32) << np.uint32(_STATUS_BITS)
    return starts


def join_pieces(
    path: Path, pieces: Sequence[Piece], texts: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, str]:
    """Writes the segment of some pieces; returns column -> digest. Only one piece is in memory at a time.

    Args:
        path: the file.
        pieces: where the samples are now, in order.
        texts: texts to keep; every piece has them.
        metadata: what else the file says.
    """
    num_samples = sum(piece.stop - piece.start for piece in pieces)
    text_bytes, scores = dict.fromkeys(texts, 0), dict[str, None]()
    for piece, segment in _opened(pieces):
        scores |= dict.fromkeys(segment.scores)
        for text in texts:
            text_bytes[text] += len(segment.joined(text, piece.rows))
    with replacing(path, is_shared=True) as writing, open(writing, "wb") as file:
        writer = ColumnWriter(file.fileno(), _shapes(num_samples, text_bytes, list(scores)), metadata)
        joints = {text: _TextJoint(num_samples) for text in texts}
        for piece, segment in _opened(pieces):
            for name in (*FIXED_COLUMNS, *(SCORE + field for field in scores)):
                writer.append(name, segment.values(name, piece.rows))
            for text, joint in joints.items():
                writer.append(f"{text}.start", joint.starts(segment, text, piece.rows))
                writer.append(f"{text}.text", segment.joined(text, piece.rows))
        for text, joint in joints.items():
            writer.append(f"{text}.start", joint.last_start())
            writer.append(f"{text}.base", joint.base)
        return writer.digests()


class _TextJoint:
    """The starts of a text whose pieces come one after the other."""

    def __init__(self, num_samples: int) -> None:
        self.base = np.zeros(num_samples // GROUP + 1, np.int64)
        self._row = 0
        self._end = 0

    def starts(self, segment: Segment, text: str, rows: slice) -> np.ndarray:
        lengths = segment.text_lengths(text, rows)
        absolute = self._end + np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._end = int(absolute[-1])
        absolute = absolute[:-1]
        is_first = np.flatnonzero(np.arange(self._row, self._row + len(absolute)) % GROUP == 0)
        self.base[(self._row + is_first) >> _GROUP_BITS] = absolute[is_first]
        found = _relative(absolute, self.base, self._row, segment.status(text, rows))
        self._row += len(absolute)
        return found

    def last_start(self) -> np.ndarray:
        """The end of the last text."""
        if self._row % GROUP == 0:
            self.base[self._row >> _GROUP_BITS] = self._end
        return _relative(np.array([self._end]), self.base, self._row, np.zeros(0, np.uint8))


def _opened(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Segment]]:
    """Every piece with its segment; neighbours in the same file share it, and only one is open at a time."""
    path, segment = None, None
    for piece in pieces:
        if segment is None or piece.path != path:
            path, segment = piece.path, Segment.of_file(piece.path)
        yield piece, segment


def _shapes(num_samples: int, text_bytes: Mapping[str, int], scores: Sequence[str]) -> Shapes:
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, (dtype, width) in FIXED_COLUMNS.items():
        shapes[name] = np.dtype(dtype), (num_samples, width)
    for text, num_bytes in text_bytes.items():
        shapes[f"{text}.base"] = np.dtype(np.int64), (num_samples // GROUP + 1,)
        shapes[f"{text}.start"] = np.dtype(np.uint32), (num_samples + 1,)
        shapes[f"{text}.text"] = np.dtype(np.uint8), (num_bytes,)
    return shapes | {SCORE + field: (np.dtype(np.float32), (num_samples,)) for field in scores}
