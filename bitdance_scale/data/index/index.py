"""The index: where every sample of a data set lies, its size, captions and scores, in memory-mapped segments.

`build.py` writes it once; `open_index` opens it everywhere. In the index folder every list of shards has a table of its
own, `index_LIST.json`, which names its segments (`segment.py`); several tables may name the same one. All appear by
rename, so a reader sees the old build or the new one and never a mixture. Segments that no table names any more stay
until somebody deletes them, because runs may have them open.

The position of a sample in the index is its key everywhere (`Sample.key`). The index hash covers order, sizes, places
and checksums of the images. It does not cover where the shards lie, so a run resumes on a moved data set. Captions and
scores have digests of their own, for the plans that use them.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.captions import KEY_SOURCES, SEPARATOR, found_in_key, part_of_key
from bitdance_scale.data.index.segment import SCORE, Segment
from bitdance_scale.data.index.shard_scan import NAME, caption_column
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, TarError
from bitdance_scale.data.index.verification import SETTING, SegmentEntry, find_damage
from bitdance_scale.data.storage.faults import MISSING, unreadable
from bitdance_scale.errors import DataError, UnreadableError

FORMAT = 3
EARLIER_TABLE = "index.json"
"""The only table of a folder in earlier versions, of the list of shards that was indexed there last."""
_TABLE = re.compile(r"index(_[0-9a-f]{16})?\.json")


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was when it was indexed.

    Attributes:
        path: absolute path of the tar, or `s3://BUCKET/KEY`.
        num_bytes: length of the shard.
        tag: `store_contract.ShardState.tag`; a change of the tag or the length shows that the shard has changed.
        num_samples: samples of the shard that are in the index.
        errors: `shard_errors.ShardError` -> how often the scan found it.
        tar_errors: the places where the tar is broken, the first of them if they are many.
    """

    path: str
    num_bytes: int
    tag: str
    num_samples: int
    errors: dict[str, int]
    tar_errors: tuple[TarError, ...] = ()


class Place(NamedTuple):
    """Where an image lies.

    Attributes:
        path: its shard.
        offset: first byte of its content; the 512 bytes before it are its tar header.
        num_bytes: length of the content.
        checksum: of header and content (`checksums.checksum32`).
        tag: tag of the shard when it was indexed.
    """

    path: str
    offset: int
    num_bytes: int
    checksum: int
    tag: str


class Index:
    """All N samples of a data set.

    Samples are numbered through all shards. Where an argument is called `samples`, it is a slice or int64 [n].

    Args:
        shards: table of the shards, in order.
        segments: their samples, in order.
        captions: caption sources that every segment has.
        scores: fields that some segment has.
        digest: the hash.
        digests: digests of captions and scores.
        table: file of the table; None: in memory alone.

    Attributes:
        hash: hexadecimal digest of order, sizes, places and checksums.
        shards: table of the shards in the order of `data.shards`; the shards of a source are contiguous.
        captions: caption sources that are kept (`captions.CaptionSource`); parts of the key are found in the names.
        scores: numeric fields of the records that are kept.
        digests: hexadecimal digest of each caption source and score.
        sources: samples of each source, which are contiguous; one range unless the index was `divided`.
        segments: as given.
        table: as given.
    """

    def __init__(
        self,
        shards: Sequence[ShardEntry],
        segments: Sequence[Segment],
        *,
        captions: Sequence[str],
        scores: Sequence[str],
        digest: str = "",
        digests: Mapping[str, str] | None = None,
        table: Path | None = None,
    ) -> None:
        self.hash = digest
        self.shards = tuple(shards)
        self.captions = tuple(captions)
        self.scores = tuple(scores)
        self.digests = digests or {}
        self.table = table
        self.segments = tuple(segments)
        self._segment_starts = list(itertools.accumulate((s.num_samples for s in self.segments), initial=0))
        self._shard_starts = list(itertools.accumulate((entry.num_samples for entry in self.shards), initial=0))
        self.sources: tuple[range, ...] = (range(len(self)),)

    def __len__(self) -> int:
        return self._segment_starts[-1]

    def divided(self, num_shards: Sequence[int]) -> Index:
        """The same index with sources: the first `num_shards[0]` shards are the first source, and so on."""
        assert sum(num_shards) == len(self.shards), (num_shards, len(self.shards))
        stops = [self._shard_starts[row] for row in itertools.accumulate(num_shards, initial=0)]
        divided = Index(
            self.shards,
            self.segments,
            captions=self.captions,
            scores=self.scores,
            digest=self.hash,
            digests=self.digests,
            table=self.table,
        )
        divided.sources = tuple(itertools.starmap(range, itertools.pairwise(stops)))
        return divided

    def sizes_px(self, samples: slice | np.ndarray) -> np.ndarray:
        """int32 [n, 2], (height, width) of the stored pictures, upright."""
        return self._values("size_px", samples).astype(np.int32)

    def original_sizes_px(self, samples: slice | np.ndarray) -> np.ndarray:
        """int32 [n, 2], (height, width) before img2dataset resized the pictures; 0: not known."""
        return self._values("original_px", samples).astype(np.int32)

    def score(self, field: str, samples: slice | np.ndarray = slice(None)) -> np.ndarray:
        """float32 [n], a numeric field of the records; NaN for samples without it."""
        return self._values(SCORE + field, samples)

    def status(self, source: str, samples: slice | np.ndarray = slice(None)) -> np.ndarray:
        """uint8 [n], `captions.CaptionStatus` of a caption source."""
        if source in KEY_SOURCES:
            keys = list(self._joined_texts(NAME, samples)) if isinstance(samples, slice) else self._texts(NAME, samples)
            return np.fromiter((found_in_key(source, key)[1] for key in keys), np.uint8, len(keys))
        text = caption_column(source)
        return self._gather(lambda segment, rows: segment.status(text, rows), samples)

    def caption_bytes(self, source: str, samples: slice) -> np.ndarray:
        """int64 [n], length of a caption, all alternatives together."""
        text = caption_column(source)
        return np.concatenate([segment.text_lengths(text, rows) for segment, rows in self._parts(samples)])

    def texts(self, source: str, samples: np.ndarray) -> list[list[str]]:
        """All alternatives of a caption of each sample; one empty text unless its status is USABLE.

        The texts are fetched in the order in which they lie in the files, however the samples are ordered.
        """
        if source in KEY_SOURCES:
            found = [found_in_key(source, key)[0] for key in self._texts(NAME, samples)]
        else:
            found = self._texts(caption_column(source), samples)
        return [text.decode("utf-8").split(SEPARATOR) for text in found]

    def distinct_texts(self, source: str, samples: slice) -> set[bytes]:
        """The different captions of a range, each with its alternatives in one; empty for those that are not USABLE.

        Those of a part of the key are as they stand there, and need not be UTF-8.
        """
        if source not in KEY_SOURCES:
            return set(self._joined_texts(caption_column(source), samples))
        return {part_of_key(source, key) for key in self._joined_texts(NAME, samples)}

    def caption(self, sample: int, source: str | None = None) -> str:
        """The first alternative of a caption of a sample; empty unless its status is USABLE.

        Args:
            sample: position in the index.
            source: one of `captions`; None: the first.
        """
        return self.texts(source or self.captions[0], np.array([sample]))[0][0]

    def name(self, sample: int) -> str:
        """Key of a sample inside its shard; bytes that are no UTF-8 as escapes."""
        return self._texts(NAME, np.array([sample]))[0].decode("utf-8", errors="backslashreplace")

    def shard_row(self, sample: int) -> int:
        """Row in `shards` of the shard that holds a sample."""
        return bisect.bisect_right(self._shard_starts, sample) - 1

    def shard_path(self, sample: int) -> str:
        """Path of the shard that holds a sample."""
        return self.shards[self.shard_row(sample)].path

    def shard_samples(self, row: int) -> range:
        """The samples of a shard, by its row in `shards`."""
        return range(self._shard_starts[row], self._shard_starts[row + 1])

    def place(self, sample: int) -> Place:
        """Where the image of a sample lies."""
        entry = self.shards[self.shard_row(sample)]
        block, num_bytes, checksum = self.places(slice(sample, sample + 1))[0].tolist()
        return Place(entry.path, block * BLOCK_BYTES, num_bytes, checksum, entry.tag)

    def places(self, samples: slice | np.ndarray) -> np.ndarray:
        """uint32 [n, 3]: first block of 512 bytes, length in bytes and checksum of each image."""
        return self._values("place", samples)

    def size_px(self, sample: int) -> tuple[int, int]:
        """(height, width) of a stored picture, upright."""
        height, width = self._values("size_px", slice(sample, sample + 1))[0].tolist()
        return height, width

    def errors(self) -> dict[str, dict[str, int]]:
        """What the scan found wrong: `shard_errors.ShardError` -> shard path -> count."""
        counts: dict[str, dict[str, int]] = {}
        for entry in self.shards:
            for error, count in entry.errors.items():
                counts.setdefault(error, {})[entry.path] = count
        return counts

    def _values(self, column: str, samples: slice | np.ndarray) -> np.ndarray:
        return self._gather(lambda segment, rows: segment.values(column, rows), samples)

    def _gather(
        self, read: Callable[[Segment, slice | np.ndarray], np.ndarray], samples: slice | np.ndarray
    ) -> np.ndarray:
        """What `read` gives for some samples, segment by segment."""
        if isinstance(samples, slice):
            parts = [read(segment, rows) for segment, rows in self._parts(samples)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(self.segments) == 1:
            return read(self.segments[0], samples)
        found: np.ndarray | None = None
        for segment, places, rows in self._split(samples):
            values = read(segment, rows)
            if found is None:
                found = np.empty((len(samples), *values.shape[1:]), values.dtype)
            found[places] = values
        return read(self.segments[0], samples) if found is None else found

    def _parts(self, samples: slice) -> list[tuple[Segment, slice]]:
        """The segments that a range lies in, with its rows there; one empty part for an empty range."""
        start, stop, step = samples.indices(len(self))
        assert step == 1, samples
        parts: list[tuple[Segment, slice]] = []
        first = max(0, bisect.bisect_right(self._segment_starts, start, hi=len(self.segments)) - 1)
        for segment, begin in zip(self.segments[first:], self._segment_starts[first:], strict=False):
            if parts and begin >= stop:
                break
            rows = slice(max(start - begin, 0), max(start - begin, 0, min(stop - begin, segment.num_samples)))
            parts.append((segment, rows))
        return parts

    def _split(self, samples: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Every segment that holds some of the samples, with their places among `samples` and their rows in it."""
        numbers = np.searchsorted(self._segment_starts, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield self.segments[number], places, samples[places] - self._segment_starts[number]

    def _joined_texts(self, text: str, samples: slice) -> Iterator[bytes]:
        """The texts of a range, read at once."""
        for segment, rows in self._parts(samples):
            content = segment.joined(text, rows).tobytes()
            ends = np.cumsum(segment.text_lengths(text, rows)).tolist()
            yield from (content[begin:end] for begin, end in itertools.pairwise([0, *ends]))

    def _texts(self, text: str, samples: np.ndarray) -> list[bytes]:
        found = [b""] * len(samples)
        order = np.argsort(samples, kind="stable")
        for segment, places, rows in self._split(samples[order]):
            for place, content in zip(order[places].tolist(), segment.read_texts(text, rows), strict=True):
                found[place] = content
        return found


def default_index_dir(shards: Sequence[str]) -> str:
    """The index folder when `data.index_dir` is empty: `.bitdance_index` beside the first shard.

    Raises:
        DataError: the shard is on S3, where an index cannot lie.
    """
    if shards[0].startswith(S3_SCHEME):
        raise DataError(
            f"data.index_dir is empty and {shards[0]} is on S3. Set data.index_dir (or --index-dir of a tool) to a "
            "folder that all ranks see."
        )
    return str(Path(shards[0]).parent / ".bitdance_index")


def sources_index_dir(names: Sequence[str], shards: Sequence[str]) -> str:
    """The same for named sources: a folder of their own, beside the first shard of the first."""
    return f"{default_index_dir(shards)}_{'_'.join(names)}"


@dataclass(frozen=True)
class IndexTable:
    """What a table says.

    Attributes:
        path: its file.
        hash, captions, scores, digests: as of the `Index`.
        segments: the segments.
        shards: the shards, with absolute paths.
    """

    path: Path
    hash: str
    captions: tuple[str, ...]
    scores: tuple[str, ...]
    digests: dict[str, str]
    segments: tuple[SegmentEntry, ...]
    shards: tuple[ShardEntry, ...]


def table_path(index_dir: Path, shards: Sequence[str]) -> Path:
    """The table that a list of shards has in an index folder; jobs on other lists do not touch it.

    Its name covers the paths as the folder sees them, so the two can be moved together.
    """
    stored = "\n".join(stored_path(path, index_dir) for path in shards)
    return index_dir / f"index_{xxhash.xxh3_64_hexdigest(stored.encode())}.json"


def table_paths(index_dir: Path) -> list[Path]:
    """All tables in an index folder.

    Raises:
        UnreadableError: the folder cannot be read now.
    """
    try:
        return [index_dir / name for name in sorted(os.listdir(index_dir)) if _TABLE.fullmatch(name)]
    except MISSING:
        return []
    except OSError as error:
        raise unreadable(index_dir, error, SETTING) from error


def find_table(index_dir: Path, shards: Sequence[str]) -> IndexTable | None:
    """The table of a list of shards, of an earlier version too; None if there is none that is sound.

    Raises:
        UnreadableError: a file cannot be read now.
    """
    written = table_paths(index_dir)
    for path in (table_path(index_dir, shards), index_dir / EARLIER_TABLE):
        if path not in written:
            continue
        try:
            table = read_table(path)
        except UnreadableError:
            raise
        except DataError:
            continue
        if [entry.path for entry in table.shards] == list(shards):
            return table
    return None


@contextmanager
def _reading(table: Path) -> Iterator[None]:
    """Says of an index that cannot be opened whether it is damaged or cannot be read now."""
    try:
        yield
    except (*MISSING, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{table}: no usable index ({error!r}). Delete {table} to build it again.") from error
    except OSError as error:
        raise unreadable(table, error, SETTING) from error


def read_table(path: Path) -> IndexTable:
    """A table.

    Raises:
        UnreadableError: it cannot be read now.
        DataError: there is none, or it is damaged or has another format.
    """
    with _reading(path):
        table = orjson.loads(path.read_bytes())
        if table["format"] != FORMAT:
            raise DataError(
                f"{path}: format {table['format']}, this version reads {FORMAT}. Delete {path} to build it again."
            )
        return IndexTable(
            path=path,
            hash=table["hash"],
            captions=tuple(table["captions"]),
            scores=tuple(table["scores"]),
            digests=table["digests"],
            segments=tuple(SegmentEntry(**entry) for entry in table["segments"]),
            shards=tuple(entry_of_table(shard, path.parent) for shard in table["shards"]),
        )


def open_index(table: str | Path, *, is_verified: bool = False) -> Index:
    """Opens an index that `build.build_index` has built.

    Segments whose files have changed since they were last checked are compared with their digests.

    Args:
        table: its table, as `Index.table` and `find_table` give it.
        is_verified: whether another process has just checked the segments, so that their lengths suffice.

    Raises:
        UnreadableError: it cannot be read now, or too many files are open.
        DataError: there is none, or it is damaged or has another format.
    """
    found = read_table(Path(table))
    index_dir = found.path.parent
    if not is_verified:
        for entry, damage in find_damage(index_dir, found.segments).items():
            raise DataError(
                f"{index_dir / entry.file}: {damage}. `bitdance index`, or the next run, reads the shards of this "
                "segment again."
            )
    with _reading(found.path):
        segments = [Segment.of_file(index_dir / entry.file) for entry in found.segments]
    return Index(
        found.shards,
        segments,
        captions=found.captions,
        scores=found.scores,
        digest=found.hash,
        digests=found.digests,
        table=found.path,
    )


def stored_path(path: str, index_dir: Path) -> str:
    """The path of a shard as the tables in this folder have it; the other way: `entry_of_table`."""
    return path if path.startswith(S3_SCHEME) else os.path.relpath(path, os.path.abspath(index_dir))


def entry_of_table(shard: Mapping[str, Any], index_dir: Path) -> ShardEntry:
    """A shard as the table of an index in this folder has it."""
    path = shard["path"]
    if not path.startswith(S3_SCHEME):
        path = os.path.abspath(index_dir / path)
    tar_errors = tuple(TarError(**tar_error) for tar_error in shard["tar_errors"])
    return ShardEntry(**{**shard, "path": path, "tar_errors": tar_errors})
