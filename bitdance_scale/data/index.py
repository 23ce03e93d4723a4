"""The index: where every sample of a data set lies, its stored size and its caption, in memory-mapped columns.

Built once by one process (`build_index`), then opened by all (`open_index`). In the index folder, `index.json` holds
the shard table and names a folder of columns, one `.npy` each; both appear by rename, so a reader sees an old build or
a new one, never half of one. The columns of a superseded build stay until their folder is deleted, for runs that have
it open.

A sample is known by its position in the index, which is its key everywhere (`Sample.key`). The index hash covers
everything a plan depends on (order, sizes, captions, places in the shards) and not where the shards lie, so that a
moved data set resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitdance_scale.data.shard_scan import COLUMN_DTYPES, ShardContent, scan_shard
from bitdance_scale.errors import DataError

_FORMAT = 1
_TABLE_NAME = "index.json"
_TEXT_COLUMNS = ("caption", "name")


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was when indexed.

    Attributes:
        path: absolute path of the tar.
        num_bytes, mtime_ns: size and modification time, by which a changed shard is noticed.
        num_samples: its samples in the index.
        faults: `shard_scan.IndexFault` -> how often the scan found it.
    """

    path: str
    num_bytes: int
    mtime_ns: int
    num_samples: int
    faults: dict[str, int]


class Index:
    """All samples of a data set, in columns; N samples.

    Attributes:
        hash: hexadecimal digest of what a plan depends on.
        shards: table of the shards, in the order of `data.shards`; those of a source lie together.
        sources: samples of each source, which lie together; one range unless the index was `divided`.
        shard: int32 [N], row in `shards`.
        image_offset: int64 [N], first byte of the image in its shard.
        image_bytes: int64 [N], its length.
        header_crc: uint32 [N], CRC-32 of its tar header.
        height_px, width_px: int32 [N], stored size.
        caption_status: uint8 [N], `captions.CaptionStatus`.
    """

    def __init__(self, digest: str, shards: tuple[ShardEntry, ...], columns: dict[str, np.ndarray]) -> None:
        self.hash = digest
        self.shards = shards
        self.columns = columns
        self.shard = columns["shard"]
        self.image_offset = columns["image_offset"]
        self.image_bytes = columns["image_bytes"]
        self.header_crc = columns["header_crc"]
        self.height_px = columns["height_px"]
        self.width_px = columns["width_px"]
        self.caption_status = columns["caption_status"]
        self.sources: tuple[range, ...] = (range(len(self)),)

    def __len__(self) -> int:
        return len(self.shard)

    def divided(self, num_shards: Sequence[int]) -> Index:
        """The same index, its first `num_shards[0]` shards the first source, the next `num_shards[1]` the second, ..."""
        assert sum(num_shards) == len(self.shards), (num_shards, len(self.shards))
        samples_before = np.cumsum([0, *(entry.num_samples for entry in self.shards)])
        stops = samples_before[np.cumsum([0, *num_shards])].tolist()
        divided = Index(self.hash, self.shards, self.columns)
        divided.sources = tuple(range(start, stop) for start, stop in zip(stops, stops[1:], strict=False))
        return divided

    def caption(self, sample: int) -> str:
        """Caption of a sample; empty unless its `caption_status` is USABLE."""
        return self._text("caption", sample).decode("utf-8")

    def name(self, sample: int) -> str:
        """Key of a sample inside its shard."""
        return self._text("name", sample).decode("utf-8", errors="surrogateescape")

    def shard_path(self, sample: int) -> str:
        """Path of the shard that holds a sample."""
        return self.shards[self.shard[sample]].path

    def size_px(self, sample: int) -> tuple[int, int]:
        """(height, width) of a stored image."""
        return int(self.height_px[sample]), int(self.width_px[sample])

    def faults(self) -> dict[str, dict[str, int]]:
        """What the scan found wrong: `shard_scan.IndexFault` -> shard path -> count."""
        counts: dict[str, dict[str, int]] = {}
        for entry in self.shards:
            for fault, count in entry.faults.items():
                counts.setdefault(fault, {})[entry.path] = count
        return counts

    def _text(self, column: str, sample: int) -> bytes:
        starts = self.columns[f"{column}_start"]
        return self.columns[f"{column}_text"][starts[sample] : starts[sample + 1]].tobytes()


def default_index_dir(shards: Sequence[str]) -> str:
    """`.bitdance_index` beside the first shard, where the index goes when `data.index_dir` is empty."""
    return str(Path(shards[0]).parent / ".bitdance_index")


def sources_index_dir(names: Sequence[str], shards: Sequence[str]) -> str:
    """The same for sources of these names: another folder, so that a run on the first one alone keeps its own."""
    return f"{default_index_dir(shards)}_{'_'.join(names)}"


def build_index(shards: Sequence[str], index_dir: str | Path) -> Index:
    """Brings the index of a list of shards up to date and opens it; one process of a job calls this.

    Shards that an existing index there knows by path, size and modification time are not read again.

    Args:
        shards: paths of tars, as `shards.expand_shards` gives them; their order is the order of the samples.
        index_dir: folder of the index, made if absent.

    Raises:
        DataError: a shard is missing, cut or damaged (naming byte and fix), no shard holds an image, or the folder
            cannot be written.
    """
    index_dir = Path(index_dir)
    old = open_index(index_dir) if (index_dir / _TABLE_NAME).exists() else None
    stats = [_stat(path) for path in shards]
    known = {} if old is None else {(e.path, e.num_bytes, e.mtime_ns): row for row, e in enumerate(old.shards)}
    rows = [known.get((path, stat.st_size, stat.st_mtime_ns)) for path, stat in zip(shards, stats, strict=True)]
    if old is not None and rows == list(range(len(old.shards))):
        return old

    starts = np.cumsum([0, *(entry.num_samples for entry in (() if old is None else old.shards))])
    contents = [
        scan_shard(path) if row is None else _content_of(old, row, int(starts[row]))
        for path, row in zip(shards, rows, strict=True)
    ]
    entries = tuple(
        ShardEntry(path, stat.st_size, stat.st_mtime_ns, len(content.names), content.faults)
        for path, stat, content in zip(shards, stats, contents, strict=True)
    )
    columns = _join(contents)
    if not len(columns["shard"]):
        faults = {path: content.faults for path, content in zip(shards, contents, strict=True)}
        raise DataError(
            f"data.shards: no usable image in {len(shards)} shards ({faults}). Samples need a .jpg, .png or .webp "
            "member and, beside it, .txt and .json of the same key."
        )
    index = Index(_digest(entries, columns), entries, columns)
    try:
        _write(index, index_dir)
    except OSError as error:
        raise DataError(
            f"{index_dir}: cannot write the index ({error}). Set data.index_dir to a writable folder."
        ) from error
    return open_index(index_dir)


def open_index(index_dir: str | Path) -> Index:
    """Opens the index that `build_index` left in a folder.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    index_dir = Path(index_dir)
    table_path = index_dir / _TABLE_NAME
    try:
        table = json.loads(table_path.read_text(encoding="utf-8"))
        if table["format"] != _FORMAT:
            raise DataError(
                f"{table_path}: format {table['format']}, this version reads {_FORMAT}. Delete {index_dir} to build it "
                "anew."
            )
        entries = tuple(
            ShardEntry(os.path.abspath(index_dir / shard["path"]), **{k: v for k, v in shard.items() if k != "path"})
            for shard in table["shards"]
        )
        names = ("shard", *COLUMN_DTYPES, *(f"{t}_{part}" for t in _TEXT_COLUMNS for part in ("start", "text")))
        folder = index_dir / _columns_name(table["hash"])
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{table_path}: no usable index ({error!r}). Delete {index_dir} to build it anew.") from error
    return Index(table["hash"], entries, columns)


def _columns_name(digest: str) -> str:
    return f"columns_{digest[:16]}"


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot open the shard ({error.strerror}). Correct data.shards or restore the file."
        ) from error


def _content_of(index: Index, row: int, start: int) -> ShardContent:
    """What a scan of an indexed shard would find; its samples lie together from `start` on."""
    samples = range(start, start + index.shards[row].num_samples)
    return ShardContent(
        columns={name: index.columns[name][samples.start : samples.stop] for name in COLUMN_DTYPES},
        captions=[index._text("caption", sample) for sample in samples],
        names=[index._text("name", sample) for sample in samples],
        faults=index.shards[row].faults,
    )


def _join(contents: Sequence[ShardContent]) -> dict[str, np.ndarray]:
    columns = {name: np.concatenate([content.columns[name] for content in contents]) for name in COLUMN_DTYPES}
    counts = [len(content.names) for content in contents]
    columns["shard"] = np.repeat(np.arange(len(contents), dtype=np.int32), counts)
    for column, texts in (
        ("caption", [text for content in contents for text in content.captions]),
        ("name", [text for content in contents for text in content.names]),
    ):
        columns[f"{column}_start"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        # One byte more than needed: an empty array cannot be mapped.
        columns[f"{column}_text"] = np.frombuffer(b"".join(texts) + b"\0", dtype=np.uint8)
    return columns


def _digest(entries: Sequence[ShardEntry], columns: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"bitdance index {_FORMAT}".encode())
    digest.update(np.array([entry.num_bytes for entry in entries], dtype=np.int64).tobytes())
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(columns[name].tobytes())
    return digest.hexdigest()[:32]


def _write(index: Index, index_dir: Path) -> None:
    """Columns first, then the table that names them, each by rename."""
    index_dir.mkdir(parents=True, exist_ok=True)
    folder = index_dir / _columns_name(index.hash)
    if not folder.exists():
        building = index_dir / f".building_{uuid.uuid4().hex}"
        building.mkdir()
        try:
            for name, column in index.columns.items():
                np.save(building / f"{name}.npy", column, allow_pickle=False)
            building.rename(folder)
        except OSError:
            shutil.rmtree(building, ignore_errors=True)
            # Another job may have built the same index meanwhile.
            if not folder.exists():
                raise
    shards = [
        {**dataclasses.asdict(entry), "path": os.path.relpath(entry.path, os.path.abspath(index_dir))}
        for entry in index.shards
    ]
    table = {"format": _FORMAT, "hash": index.hash, "shards": shards}
    temporary = index_dir / f".building_{uuid.uuid4().hex}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(index_dir / _TABLE_NAME)
