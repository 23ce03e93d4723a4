"""Finds the samples of one shard: image-text pairs in img2dataset's WebDataset layout.

A sample is all members with the same key: an image (`.jpg`, `.jpeg`, `.png` or `.webp`), a `.txt` caption that may be
missing, and a `.json` record whose `width` and `height` are the stored size. Only headers, texts and records are read;
an image is read only if its record does not give its size.

As in webdataset, the key of a member is its name up to the first dot of the file name, and its extension is the rest in
lower case: `a/0001.syn.json` has key `a/0001` and extension `syn.json`.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson

from bitdance_scale.data.captions import DEFAULT_SOURCE, MAX_TEXT_BYTES, CaptionSource, CaptionStatus
from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.image_decode import read_size_px
from bitdance_scale.data.index.tar_scan import WINDOW_BYTES, Members, ReadRange, TarError, TarScan

_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Members that webdataset reserves for itself.
_META_NAME = re.compile(rb"__[^/]*__($|/)")
_SIZE_FIELDS = ("height", "width", "original_height", "original_width")
_MAX_SCORES = 64
_NUMBERS = {int, float, bool}
_MAX_SIDE_PX = 2**31

COLUMN_DTYPES: dict[str, type] = {
    "image_offset": np.int64,
    "image_bytes": np.int64,
    "header_crc": np.uint32,
    "height_px": np.int32,
    "width_px": np.int32,
    "original_height_px": np.int32,
    "original_width_px": np.int32,
}


class ShardError(enum.StrEnum):
    """What a scan of a shard counts as wrong. The first three may keep samples out of the index.

    Their values are in the tables of existing indexes.
    """

    DAMAGED_TAR = "damaged_tar"
    MISSING_IMAGE = "missing_image"
    UNREADABLE_SIZE = "unreadable_size"
    INVALID_JSON = "invalid_json"
    DUPLICATE_MEMBER = "duplicate_member"


@dataclass(frozen=True)
class Texts:
    """One text per sample.

    Attributes:
        lengths: int64 [n], in bytes.
        joined: all texts, one after the other.
    """

    lengths: np.ndarray
    joined: bytes

    @staticmethod
    def of(texts: Sequence[bytes]) -> Texts:
        """Joins the texts of all samples."""
        return Texts(np.fromiter(map(len, texts), np.int64, len(texts)), b"".join(texts))


@dataclass(frozen=True)
class ShardContent:
    """The n samples of one shard, in the order of their first members.

    Attributes:
        columns: one array [n] per entry of `COLUMN_DTYPES`.
        names: key of every sample in the shard.
        captions: source -> texts in UTF-8 (`captions.Found`), and uint8 [n] of `CaptionStatus`.
        scores: field of the record -> float32 [n], NaN for samples without a number there.
        errors: how often each `ShardError` was found.
        tar_errors: the places where the tar is broken.
    """

    columns: dict[str, np.ndarray]
    names: Texts
    captions: dict[str, tuple[Texts, np.ndarray]]
    scores: dict[str, np.ndarray]
    errors: dict[str, int]
    tar_errors: tuple[TarError, ...]

    def __len__(self) -> int:
        return len(self.names.lengths)


class _Image(NamedTuple):
    offset: int
    num_bytes: int
    header_crc: int


_Sample = dict[str, Any]
"""Extension -> `_Image`, or the bytes of a text or record, or None for a member that is not used."""


def scan_shard(
    read: ReadRange,
    total_bytes: int,
    captions: Sequence[str] = (DEFAULT_SOURCE,),
    window_bytes: int = WINDOW_BYTES,
) -> ShardContent:
    """Reads headers, captions and records of a tar.

    Args:
        read: reads a range of the tar.
        total_bytes: length of the tar.
        captions: caption sources to keep (`captions.CaptionSource`).
        window_bytes: how much of the tar is read at a time.
    """
    sources = [CaptionSource.parse(name) for name in captions]
    errors: Counter[str] = Counter()
    scan = TarScan(read, total_bytes, window_bytes)
    samples = _group(scan, read, {"json", *(e for source in sources for e in source.extensions)}, errors)
    errors[ShardError.DAMAGED_TAR] = len(scan.tar_errors)
    record_extensions = {"json", *(source.extension for source in sources if source.field is not None)}
    names: list[bytes] = []
    rows: list[tuple[int, ...]] = []
    scores = _Scores()
    found: list[list[tuple[bytes, CaptionStatus]]] = [[] for _ in sources]
    for key, sample in samples.items():
        image = next((sample[extension] for extension in _IMAGE_EXTENSIONS if extension in sample), None)
        if image is None:
            errors[ShardError.MISSING_IMAGE] += 1
            continue
        parsed = {e: _record(sample[e], errors) for e in record_extensions if e in sample}
        record = parsed.get("json", {})
        sizes = [_side(record.get(field)) for field in _SIZE_FIELDS]
        if not (sizes[0] and sizes[1]):
            try:
                sizes[:2] = read_size_px(read(image.offset, image.num_bytes))
            except SampleError:
                errors[ShardError.UNREADABLE_SIZE] += 1
                continue
        names.append(key)
        rows.append((*image, *sizes))
        scores.add(record)
        for source, texts in zip(sources, found, strict=True):
            texts.append(source.find(sample, parsed))
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMN_DTYPES)
    return ShardContent(
        columns={
            name: np.array(column, dtype) for (name, dtype), column in zip(COLUMN_DTYPES.items(), values, strict=True)
        },
        names=Texts.of(names),
        captions={
            source.name: (Texts.of([text for text, _ in texts]), np.fromiter((status for _, status in texts), np.uint8))
            for source, texts in zip(sources, found, strict=True)
        },
        scores=scores.columns(),
        errors={str(error): count for error, count in errors.items() if count},
        tar_errors=tuple(scan.tar_errors),
    )


def _group(
    scan: Iterable[Members], read: ReadRange, text_extensions: set[str], errors: Counter[str]
) -> dict[bytes, _Sample]:
    """Key -> members of the sample; if a name is repeated, the first one counts."""
    samples: dict[bytes, _Sample] = {}
    extensions: dict[bytes, str] = {}
    last_key: bytes | None = None
    sample: _Sample = {}
    for members in scan:
        window, start, stop = members.window, members.start, members.start + len(members.window)
        for name, offset, num_bytes, crc in zip(
            members.names, members.offsets, members.num_bytes, members.header_crcs, strict=True
        ):
            begin = name.rfind(b"/") + 1
            dot = name.find(b".", begin)
            if dot <= begin:
                continue
            key = name[:dot]
            if key != last_key:
                last_key = key
                known = samples.get(key)
                if known is None:
                    is_meta = key[:2] == b"__" and _META_NAME.match(name) is not None
                    known = {} if is_meta else samples.setdefault(key, {})
                sample = known
            extension = extensions.get(name[dot + 1 :])
            if extension is None:
                extension = name[dot + 1 :].decode("utf-8", errors="replace").lower()
                extensions[name[dot + 1 :]] = extension
            if extension in sample:
                errors[ShardError.DUPLICATE_MEMBER] += 1
            elif extension not in text_extensions:
                sample[extension] = _Image(offset, num_bytes, crc) if extension in _IMAGE_EXTENSIONS else None
            elif num_bytes > MAX_TEXT_BYTES:
                # Neither valid UTF-8 nor valid JSON.
                sample[extension] = b"\xff"
            elif offset + num_bytes <= stop:
                sample[extension] = window[offset - start : offset - start + num_bytes]
            else:
                sample[extension] = read(offset, num_bytes)
    return samples


def _record(content: bytes, errors: Counter[str]) -> dict[str, Any]:
    try:
        record = orjson.loads(content)
    except ValueError:
        try:
            # Python writes what the JSON standard forbids: NaN, lone surrogates.
            record = json.loads(content)
        except (ValueError, RecursionError):
            record = None
    if isinstance(record, dict):
        return record
    errors[ShardError.INVALID_JSON] += 1
    return {}


def _side(value: object) -> int:
    """A side in pixels; 0 if the value is not a valid side."""
    return value if type(value) is int and 0 < value < _MAX_SIDE_PX else 0


class _Scores:
    """Collects the numeric fields of records except sizes; records with the same fields are transposed together."""

    def __init__(self) -> None:
        self._num_records = 0
        self._by_layout: dict[tuple[str, ...], tuple[list[int], list[tuple[object, ...]]]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Adds the record of the next sample."""
        rows, values = self._by_layout.setdefault(tuple(record), ([], []))
        rows.append(self._num_records)
        values.append(tuple(record.values()))
        self._num_records += 1

    def columns(self) -> dict[str, np.ndarray]:
        """Field -> float32 [n], NaN for samples without a number there."""
        columns: dict[str, np.ndarray] = {}
        for layout, (rows, values) in self._by_layout.items():
            for field, found in zip(layout, zip(*values, strict=True), strict=False):
                if field in _SIZE_FIELDS or not _NUMBERS & set(map(type, found)):
                    continue
                if field not in columns and len(columns) == _MAX_SCORES:
                    continue
                column = columns.setdefault(field, np.full(self._num_records, np.nan, np.float32))
                column[rows] = [_number(value) for value in found]
        return columns


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:
        return np.nan
