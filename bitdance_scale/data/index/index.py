"""The index: where every sample of a data set lies, its stored size, captions and scores, in memory-mapped columns.

`index_build.py` makes it once; `open_index` opens it everywhere. In the index folder, `index.json` holds the shard table
and names a folder of columns, one `.npy` each; both appear by rename, so a reader sees an old build or a new one, never
half of one. The columns of a superseded build stay until their folder is deleted, for runs that have it open.

A sample is known by its position in the index, which is its key everywhere (`Sample.key`). The index hash covers order,
sizes and places in the shards, and not where the shards lie, so that a moved data set resumes; captions and scores have
digests of their own, for the plans that use them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from bitdance_scale.data.captions import SEPARATOR
from bitdance_scale.data.index.shard_scan import COLUMN_DTYPES, ShardContent
from bitdance_scale.data.index.tar_scan import TarError
from bitdance_scale.data.storage.stores import S3_SCHEME
from bitdance_scale.errors import DataError
from bitdance_scale.renames import RENAMED_INDEX_FIELDS, with_new_names

FORMAT = 2
TABLE_NAME = "index.json"
NAME = "name"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was when indexed.

    Attributes:
        path: absolute path of the tar, or `s3://BUCKET/KEY`.
        num_bytes: its length.
        tag: with the length, what tells that it changed (`store.ShardState`).
        num_samples: its samples in the index.
        errors: `shard_scan.ShardError` -> how often the scan found it.
        tar_errors: where the tar is broken.
    """

    path: str
    num_bytes: int
    tag: str
    num_samples: int
    errors: dict[str, int]
    tar_errors: tuple[TarError, ...] = ()


class Index:
    """All samples of a data set, in columns; N samples.

    Attributes:
        hash: hexadecimal digest of order, sizes and places.
        shards: table of the shards, in the order of `data.shards`; those of a source lie together.
        captions: sources of captions that are kept (`captions.CaptionSource`).
        digests: hexadecimal digest of each caption source and score.
        sources: samples of each source, which lie together; one range unless the index was `divided`.
        columns: the arrays below by name, those of texts in two: `NAME_start` int64 [N + 1] and `NAME_text` uint8.
        shard: int32 [N], row in `shards`.
        image_offset: int64 [N], first byte of the image in its shard.
        image_bytes: int64 [N], its length.
        header_crc: uint32 [N], CRC-32 of its tar header.
        height_px, width_px: int32 [N], stored size.
        original_height_px, original_width_px: int32 [N], size before img2dataset resized it; 0: not known.
    """

    def __init__(
        self,
        shards: tuple[ShardEntry, ...],
        columns: Mapping[str, np.ndarray],
        *,
        captions: Sequence[str],
        scores: Sequence[str],
        digest: str = "",
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.hash = digest
        self.shards = shards
        self.columns = columns
        self.captions = tuple(captions)
        self.scores = tuple(scores)
        self.digests = digests or {}
        self.shard = columns["shard"]
        self.image_offset = columns["image_offset"]
        self.image_bytes = columns["image_bytes"]
        self.header_crc = columns["header_crc"]
        self.height_px = columns["height_px"]
        self.width_px = columns["width_px"]
        self.original_height_px = columns["original_height_px"]
        self.original_width_px = columns["original_width_px"]
        self.sources: tuple[range, ...] = (range(len(self)),)

    def __len__(self) -> int:
        return len(self.shard)

    def divided(self, num_shards: Sequence[int]) -> Index:
        """The same index, its first `num_shards[0]` shards the first source, the next `num_shards[1]` the second, ..."""
        assert sum(num_shards) == len(self.shards), (num_shards, len(self.shards))
        samples_before = np.cumsum([0, *(entry.num_samples for entry in self.shards)])
        stops = samples_before[np.cumsum([0, *num_shards])].tolist()
        divided = Index(
            self.shards,
            self.columns,
            captions=self.captions,
            scores=self.scores,
            digest=self.hash,
            digests=self.digests,
        )
        divided.sources = tuple(range(start, stop) for start, stop in zip(stops, stops[1:], strict=False))
        return divided

    def caption(self, sample: int, source: str | None = None) -> str:
        """First alternative of a caption of a sample; empty unless its status is USABLE.

        Args:
            sample: position in the index.
            source: one of `captions`; None: the first.
        """
        return self.alternatives(sample, source)[0]

    def alternatives(self, sample: int, source: str | None = None) -> list[str]:
        """All alternatives of it."""
        return self._text(caption_column(source or self.captions[0]), sample).decode("utf-8").split(SEPARATOR)

    def status(self, source: str) -> np.ndarray:
        """uint8 [N], `captions.CaptionStatus` of a caption source."""
        return self.columns[caption_column(source) + "_status"]

    def score(self, field: str) -> np.ndarray:
        """float32 [N], a numeric field of the records; NaN where a sample has none."""
        return self.columns[score_column(field)]

    def name(self, sample: int) -> str:
        """Key of a sample inside its shard."""
        return self._text(NAME, sample).decode("utf-8", errors="surrogateescape")

    def shard_path(self, sample: int) -> str:
        """Path of the shard that holds a sample."""
        return self.shards[self.shard[sample]].path

    def size_px(self, sample: int) -> tuple[int, int]:
        """(height, width) of a stored image."""
        return int(self.height_px[sample]), int(self.width_px[sample])

    def errors(self) -> dict[str, dict[str, int]]:
        """What the scan found wrong: `shard_scan.ShardError` -> shard path -> count."""
        counts: dict[str, dict[str, int]] = {}
        for entry in self.shards:
            for fault, count in entry.errors.items():
                counts.setdefault(fault, {})[entry.path] = count
        return counts

    def _text(self, column: str, sample: int) -> bytes:
        starts = self.columns[f"{column}_start"]
        return self.columns[f"{column}_text"][starts[sample] : starts[sample + 1]].tobytes()


def caption_column(source: str) -> str:
    """Name of the columns of a caption source."""
    return f"caption.{source}"


def score_column(field: str) -> str:
    """Name of the column of a score."""
    return f"score.{field}"


def column_files(captions: Sequence[str], scores: Sequence[str]) -> dict[str, str]:
    """Column -> file name; a source or field may hold what no file name can."""
    files = {name: name for name in ("shard", *COLUMN_DTYPES, f"{NAME}_start", f"{NAME}_text")}
    for number, source in enumerate(captions):
        files |= {
            f"{caption_column(source)}_{part}": f"caption_{number}_{part}" for part in ("start", "text", "status")
        }
    return files | {score_column(field): f"score_{number}" for number, field in enumerate(scores)}


def content_index(entry: ShardEntry, content: ShardContent) -> Index:
    """What a scan found, as the index of one shard, without digests."""
    columns = {**content.columns, "shard": np.zeros(len(content), np.int32)}
    texts = {NAME: content.names} | {caption_column(name): text for name, (text, _) in content.captions.items()}
    for name, text in texts.items():
        columns[f"{name}_start"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(text.lengths)])
        columns[f"{name}_text"] = np.frombuffer(text.joined, np.uint8)
    columns |= {f"{caption_column(name)}_status": status for name, (_, status) in content.captions.items()}
    columns |= {score_column(field): values for field, values in content.scores.items()}
    return Index((entry,), columns, captions=tuple(content.captions), scores=tuple(content.scores))


def default_index_dir(shards: Sequence[str]) -> str:
    """`.bitdance_index` beside the first shard, where the index goes when `data.index_dir` is empty.

    Raises:
        DataError: the shard is on S3, and an index is a folder.
    """
    if shards[0].startswith(S3_SCHEME):
        raise DataError(
            f"data.index_dir is empty and {shards[0]} lies on S3: name a folder for the index that all ranks see "
            "(data.index_dir, or --index-dir of a tool)."
        )
    return str(Path(shards[0]).parent / ".bitdance_index")


def sources_index_dir(names: Sequence[str], shards: Sequence[str]) -> str:
    """The same for sources of these names: another folder, so that a run on the first one alone keeps its own."""
    return f"{default_index_dir(shards)}_{'_'.join(names)}"


def open_index(index_dir: str | Path) -> Index:
    """Opens the index that `index_build.build_index` left in a folder.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    index_dir = Path(index_dir)
    table_path = index_dir / TABLE_NAME
    try:
        table = orjson.loads(table_path.read_bytes())
        if table["format"] != FORMAT:
            raise DataError(
                f"{table_path}: format {table['format']}, this version reads {FORMAT}. Delete {index_dir} to build it "
                "again."
            )
        entries = tuple(_entry(index_dir, shard) for shard in table["shards"])
        folder = index_dir / columns_folder(table["content"])
        columns = {
            # As plain arrays: reading one number of np.memmap takes ten times as long.
            name: np.asarray(np.load(folder / f"{file}.npy", mmap_mode="r", allow_pickle=False))
            for name, file in column_files(table["captions"], table["scores"]).items()
        }
        return Index(
            entries,
            columns,
            captions=table["captions"],
            scores=table["scores"],
            digest=table["hash"],
            digests=table["digests"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{table_path}: no usable index ({error!r}). Delete {index_dir} to build it again.") from error


def columns_folder(content: str) -> str:
    """Name of the folder of the columns with this digest."""
    return f"columns_{content[:16]}"


def _entry(index_dir: Path, shard: dict[str, object]) -> ShardEntry:
    values = with_new_names(shard, RENAMED_INDEX_FIELDS)
    if not values["path"].startswith(S3_SCHEME):
        values["path"] = os.path.abspath(index_dir / values["path"])
    values["tar_errors"] = tuple(TarError(**damage) for damage in values["tar_errors"])
    return ShardEntry(**values)
