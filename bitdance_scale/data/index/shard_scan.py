"""Finds the samples of one shard: image-text pairs in img2dataset's WebDataset layout.

A sample is all members with the same key: an image (`.jpg`, `.jpeg`, `.png` or `.webp`), a `.txt` caption that may be
missing, and a `.json` record. Every image is read once for its checksum, by which a reader notices any later change,
and for the sides and the orientation in its first bytes. Decoding it is left to training.

A record gives the sides that img2dataset stored. If it kept the original bytes, these are the sides before the EXIF
orientation is applied; the index has those of the upright picture.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import xxhash

from bitdance_scale.data.captions import BYTE_ORDER_MARK, DEFAULT_SOURCE, CaptionSource, CaptionStatus
from bitdance_scale.data.images.limits import MAX_IMAGE_PIXELS
from bitdance_scale.data.index.grouping import (
    DOTTED,
    IMAGE_EXTENSIONS,
    ImageMember,
    Sample,
    group_members,
    is_ambiguous,
)
from bitdance_scale.data.index.segment import FIXED_COLUMNS, SCORE, Segment, text_columns
from bitdance_scale.data.index.shard_errors import ShardError
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, WINDOW_BYTES, ReadRange, TarError, TarScan

NAME = "name"
_SIZE_FIELDS = ("height", "width", "original_height", "original_width")
_MAX_SCORES = 64
_NUMBERS = {int, float, bool}
_MAX_SIDE_PX = (1 << 16) - 1
_TURNED = re.compile(r'"Image Orientation"\s*:\s*"(Rotated|Mirrored)')
_Sides = tuple[int, int]


@dataclass(frozen=True)
class ShardContent:
    """The n samples of one shard, in the order of `grouping.group_members`.

    Attributes:
        segment: their columns, in memory.
        errors: how often each `ShardError` was found.
        tar_errors: the places where the tar is broken.
    """

    segment: Segment
    errors: dict[str, int]
    tar_errors: tuple[TarError, ...]

    def __len__(self) -> int:
        return self.segment.num_samples


def caption_column(source: str) -> str:
    """Name of the text of a caption source in a segment."""
    return f"caption.{source}"


def scan_shard(
    read: ReadRange,
    total_bytes: int,
    captions: Sequence[str] = (DEFAULT_SOURCE,),
    window_bytes: int = WINDOW_BYTES,
) -> ShardContent:
    """Reads a tar: its headers, captions and records, and the checksums of its images.

    Args:
        read: reads a range of the tar.
        total_bytes: length of the tar.
        captions: caption sources to keep (`captions.CaptionSource`).
        window_bytes: how much of the tar is read at a time.
    """
    sources = [CaptionSource.parse(name) for name in captions]
    errors: Counter[str] = Counter()
    scan = TarScan(read, total_bytes, window_bytes)
    samples = group_members(scan, read, {"json", *(e for source in sources for e in source.extensions)}, errors)
    errors[ShardError.DAMAGED_TAR] = scan.num_tar_errors
    rows = _Rows(sources, errors)
    for key, sample in samples.items():
        rows.add(key, sample)
    return ShardContent(
        segment=rows.segment(),
        errors={str(error): count for error, count in errors.items() if count},
        tar_errors=tuple(scan.tar_errors),
    )


class _Rows:
    """Collects what the index keeps of each sample."""

    def __init__(self, sources: Sequence[CaptionSource], errors: Counter[str]) -> None:
        self._sources, self._errors = sources, errors
        self._record_extensions = {"json", *(source.extension for source in sources if source.field is not None)}
        self._names: list[bytes] = []
        self._places: list[tuple[int, int, int]] = []
        self._sizes: list[_Sides] = []
        self._originals: list[_Sides] = []
        self._scores = _Scores()
        self._found: list[list[tuple[bytes, CaptionStatus]]] = [[] for _ in sources]

    def add(self, key: bytes, sample: Sample) -> None:
        """Adds a sample, or counts why it cannot be used."""
        image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if not isinstance(image, ImageMember):
            num_dotted = sample.get(DOTTED, 0)
            error = ShardError.DOTTED_NAME if num_dotted else ShardError.MISSING_IMAGE
            self._errors[image or error] += max(1, num_dotted)
            return
        if is_ambiguous(sample):
            self._errors[ShardError.TWO_IMAGES] += 1
            return
        parsed = {e: self._record(sample[e]) for e in self._record_extensions if e in sample}
        record = parsed.get("json", {})
        recorded, original = (
            (_side(record.get(f"{of}height")), _side(record.get(f"{of}width"))) for of in ("", "original_")
        )
        size = _upright_px(image, recorded)
        if size is None:
            self._errors[ShardError.UNREADABLE_SIZE] += 1
            return
        if all(recorded) and size != recorded:
            original = original[::-1]
        if image.header is not None and image.header.orientation == 1 and _says_turned(record):
            self._errors[ShardError.LOST_ROTATION] += 1
        self._names.append(key)
        self._places.append((image.offset // BLOCK_BYTES, image.num_bytes, image.checksum))
        self._sizes.append(size)
        self._originals.append(original)
        self._scores.add(record)
        for source, texts in zip(self._sources, self._found, strict=True):
            texts.append(source.find(key, sample, parsed))

    def _record(self, content: bytes) -> dict[str, Any]:
        record = parse_record(content)
        if record is None:
            self._errors[ShardError.INVALID_JSON] += 1
            return {}
        return record

    def segment(self) -> Segment:
        """All samples as a segment in memory."""
        lists: dict[str, Sequence[Any]] = {
            "place": self._places,
            "size_px": self._sizes,
            "original_px": self._originals,
        }
        columns: dict[str, np.ndarray] = {
            name: np.array(lists[name], dtype).reshape(len(self._names), width)
            for name, (dtype, width) in FIXED_COLUMNS.items()
        }
        columns |= _texts(NAME, self._names, [CaptionStatus.USABLE] * len(self._names))
        for source, found in zip(self._sources, self._found, strict=True):
            columns |= _texts(caption_column(source.name), [text for text, _ in found], [status for _, status in found])
        columns |= {SCORE + field: values for field, values in self._scores.columns().items()}
        return Segment(columns)


def changed_images(before: np.ndarray, now: np.ndarray) -> list[tuple[int, int]]:
    """Bytes (begin, end) of the images of a shard, with their tar headers, that are no longer there as they were.

    Args:
        before: uint32 [n, 3], column `place` of the shard.
        now: uint32 [m, 3], the same later.
    """
    found = {block: (num_bytes, checksum) for block, num_bytes, checksum in now.tolist()}
    return [
        ((block - 1) * BLOCK_BYTES, block * BLOCK_BYTES + num_bytes)
        for block, num_bytes, checksum in before.tolist()
        if found.get(block) != (num_bytes, checksum)
    ]


def shard_digests(columns: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Digests of the samples of one shard: of `place` (with the sizes), of every caption source and every score.

    They do not depend on the segment that a shard is in, so that the digests of an index follow from them.
    """
    digests = {"place": _digest(columns[name] for name in FIXED_COLUMNS)}
    for name in columns:
        if name.startswith("caption.") and name.endswith(".text"):
            text = name.removesuffix(".text")
            digests[text] = _digest(columns[text + part] for part in (".base", ".start", ".text"))
        elif name.startswith(SCORE):
            digests[name] = _digest([columns[name]])
    return digests


def _digest(arrays: Any) -> str:
    digest = xxhash.xxh3_64()
    for values in arrays:
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _texts(name: str, texts: Sequence[bytes], statuses: Sequence[int]) -> dict[str, np.ndarray]:
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return text_columns(name, lengths, np.fromiter(statuses, np.uint8, len(texts)), b"".join(texts))


def _upright_px(image: ImageMember, recorded: _Sides) -> _Sides | None:
    """(height, width) of the upright picture; None if nobody knows them or they are too large."""
    is_recorded = all(recorded)
    if image.header is None:
        return recorded if is_recorded else None
    if is_recorded and recorded != image.header.stored_px:
        # The upright sides, or those of another image: then the sample is skipped when it is read.
        return recorded
    upright = image.header.upright_px
    is_usable = is_recorded or upright[0] * upright[1] <= MAX_IMAGE_PIXELS
    return upright if is_usable and max(upright) <= _MAX_SIDE_PX else None


def _says_turned(record: Mapping[str, Any]) -> bool:
    """Whether the `exif` of a record, as img2dataset writes it, says that the original was not upright."""
    exif = record.get("exif")
    return isinstance(exif, str) and _TURNED.search(exif) is not None


def parse_record(content: bytes) -> dict[str, Any] | None:
    """The object in a JSON record; None if it holds something else, or is no JSON."""
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        record = orjson.loads(content)
    except ValueError:
        try:
            # Python writes what the JSON standard forbids: NaN, lone surrogates.
            record = json.loads(content)
        except (ValueError, RecursionError):
            return None
    return record if isinstance(record, dict) else None


def _side(value: object) -> int:
    """A side in pixels; 0 if the value is not a valid side."""
    return value if type(value) is int and 0 < value <= _MAX_SIDE_PX else 0


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
