"""The index: where every sample of a data set lies, its stored size, captions and scores, in memory-mapped columns.

`build.py` writes it once; `open_index` opens it everywhere. In the index folder, `index.json` holds the table of shards
and names a folder of columns, one `.npy` file each. Both appear by rename, so a reader sees the old build or the new
one and never a mixture. The columns of an old build stay until somebody deletes them, because runs may have them open.

The position of a sample in the index is its key everywhere (`Sample.key`). The index hash covers order, sizes and
places in the shards. It does not cover where the shards lie, so a run resumes on a moved data set. Captions and scores
have digests of their own, for the plans that use them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.captions import SEPARATOR
from bitdance_scale.data.index.shard_scan import COLUMN_DTYPES, ShardContent
from bitdance_scale.data.index.tar_scan import TarError
from bitdance_scale.errors import DataError
from bitdance_scale.renames import RENAMED_INDEX_FIELDS, with_new_names

FORMAT = 2
TABLE_NAME = "index.json"
NAME = "name"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was when it was indexed.

    Attributes:
        path: absolute path of the tar, or `s3://BUCKET/KEY`.
        num_bytes: length of the shard.
        tag: `store_contract.ShardState.tag`; a change of the tag or the length shows that the shard has changed.
        num_samples: samples of the shard that are in the index.
        errors: `shard_scan.ShardError` -> how often the scan found it.
        tar_errors: the places where the tar is broken.
    """

    path: str
    num_bytes: int
    tag: str
    num_samples: int
    errors: dict[str, int]
    tar_errors: tuple[TarError, ...] = ()


class Index:
    """All N samples of a data set, in columns.

    Attributes:
        hash: hexadecimal digest of order, sizes and places.
        shards: table of the shards in the order of `data.shards`; the shards of a source are contiguous.
        captions: caption sources that are kept (`captions.CaptionSource`).
        scores: numeric fields of the records that are kept.
        digests: hexadecimal digest of each caption source and score.
        sources: samples of each source, which are contiguous; one range unless the index was `divided`.
        columns: the arrays below by name. Texts have two: `NAME_start`, int64 [N + 1], and `NAME_text`, uint8.
        shard: int32 [N], row in `shards`.
        image_offset: int64 [N], first byte of the image in its shard.
        image_bytes: int64 [N], length of the image file.
        header_crc: uint32 [N], CRC-32 of the tar header of the image.
        height_px, width_px: int32 [N], stored size.
        original_height_px, original_width_px: int32 [N], size before img2dataset resized the image; 0: not known.
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
        """The same index with sources: the first `num_shards[0]` shards are the first source, and so on."""
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
        divided.sources = tuple(itertools.starmap(range, itertools.pairwise(stops)))
        return divided

    def caption(self, sample: int, source: str | None = None) -> str:
        """The first alternative of a caption of a sample; empty unless its status is USABLE.

        Args:
            sample: position in the index.
            source: one of `captions`; None: the first.
        """
        return self.alternatives(sample, source)[0]

    def alternatives(self, sample: int, source: str | None = None) -> list[str]:
        """All alternatives of a caption of a sample; the arguments are those of `caption`."""
        return self._text(caption_column(source or self.captions[0]), sample).decode("utf-8").split(SEPARATOR)

    def status(self, source: str) -> np.ndarray:
        """uint8 [N], `captions.CaptionStatus` of a caption source."""
        return self.columns[caption_column(source) + "_status"]

    def score(self, field: str) -> np.ndarray:
        """float32 [N], a numeric field of the records; NaN for samples without it."""
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
            for error, count in entry.errors.items():
                counts.setdefault(error, {})[entry.path] = count
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
    """Column -> file name; a source or field may contain characters that a file name cannot."""
    files = {name: name for name in ("shard", *COLUMN_DTYPES, f"{NAME}_start", f"{NAME}_text")}
    for number, source in enumerate(captions):
        files |= {
            f"{caption_column(source)}_{part}": f"caption_{number}_{part}" for part in ("start", "text", "status")
        }
    return files | {score_column(field): f"score_{number}" for number, field in enumerate(scores)}


def content_index(entry: ShardEntry, content: ShardContent) -> Index:
    """The result of a scan as an index of one shard, without digests."""
    columns = {**content.columns, "shard": np.zeros(len(content), np.int32)}
    texts = {NAME: content.names} | {caption_column(name): text for name, (text, _) in content.captions.items()}
    for name, text in texts.items():
        columns[f"{name}_start"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(text.lengths)])
        columns[f"{name}_text"] = np.frombuffer(text.joined, np.uint8)
    columns |= {f"{caption_column(name)}_status": status for name, (_, status) in content.captions.items()}
    columns |= {score_column(field): values for field, values in content.scores.items()}
    return Index((entry,), columns, captions=tuple(content.captions), scores=tuple(content.scores))


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
    """The same for named sources: another folder, so that a run on the first source alone keeps its own index."""
    return f"{default_index_dir(shards)}_{'_'.join(names)}"


def open_index(index_dir: str | Path) -> Index:
    """Opens the index that `build.build_index` left in a folder.

    Raises:
        DataError: there is none, or it is damaged or has another format.
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
            # As plain arrays: reading one number from an np.memmap takes ten times as long.
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
    """Name of the folder of the columns with this content digest."""
    return f"columns_{content[:16]}"


def _entry(index_dir: Path, shard: dict[str, object]) -> ShardEntry:
    values = with_new_names(shard, RENAMED_INDEX_FIELDS)
    if not values["path"].startswith(S3_SCHEME):
        values["path"] = os.path.abspath(index_dir / values["path"])
    values["tar_errors"] = tuple(TarError(**tar_error) for tar_error in values["tar_errors"])
    return ShardEntry(**values)
