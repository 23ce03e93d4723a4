"""Bit shards: the vision tokens of a data set, encoded ahead of training.

Every image shard of the index gets one bit shard: a tar of a few large members. For each resolution they hold the
packed bits of all samples one after the other (1, 4 or 16 KiB each at 256, 512 or 1024 px), and a table: where each
sample begins, its checksum, and why a sample has no bits. A table of all shards, memory-mapped, finds any sample with
one lookup and one read. Of a run with `data.augment`, every sample has several views (`augment.stored_views`), each
with its own row: those of a sample follow each other.

Sizes, captions, scores and the plan still come from the index. Training on bits therefore draws the same samples at the
same buckets as training on images, and a run can change from one to the other.

Bits are read with `pread` and not from mapped files. It is as fast as training needs, and a file that is cut short
while it is open is an error of one sample; a mapped one would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bitdance_scale.atomic_files import replacing, write_text
from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.config.schema import RunConfig, VisionSection
from bitdance_scale.config.vae_files import tokenizer_weights_file, vae_config_file
from bitdance_scale.data.augment import stored_recipe
from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import DECODE_VERSION
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.segment import SCORE
from bitdance_scale.data.plan.buckets import EligibleSamples, resolution_buckets
from bitdance_scale.data.plan.filters import SourceFilters
from bitdance_scale.data.plan.selection import select
from bitdance_scale.data.storage.faults import MISSING, unreadable
from bitdance_scale.data.storage.open_files import OpenFiles
from bitdance_scale.errors import DataError
from bitdance_scale.vision.codes import code_bytes

FORMAT = 2
"""Of bit shards and their table. Format 1 had a column for each field, and other checksums."""
TABLE_NAME = "bits.json"
META_NAME = "meta.json"
HAS_BITS, NOT_ENCODED = 0, 255
MAX_OPEN_SHARDS = 256
_SETTING = "data.bits_dir"
USTAR_BYTES = 1 << 33
"""A header of USTAR cannot say the length of a member of so many bytes."""
_SAMPLES_AT_ONCE = 1 << 20
_CAUSES = tuple(ErrorCause)

SHARD_ROW = np.dtype([("start", "<i8"), ("num_bytes", "<u4"), ("checksum", "<u4"), ("error_code", "u1")])
"""One sample in the table of a bit shard: first byte in the tar, length of the bits, `checksum32` of them, and
`HAS_BITS`, `NOT_ENCODED` or 1 + the number of an `ErrorCause`."""
ROW = np.dtype([*SHARD_ROW.descr, ("shard", "<u4")])
"""One sample in the table of all shards: the same, and the row of its shard in `Index.shards`."""

_USUAL = {"precision": "float32", "order": "block", "latents": "bits"}
"""What a recipe has that does not name them."""

Bits = bytes | ErrorCause | None
"""One sample at one resolution: its packed bits, why it has none, or None if the resolution does not draw it."""
StoredFilters = list[list[Any]]
"""Of every source that has filters: its first sample, the sample after its last, and for each filter its range in words
and the digest of the scores that it looks at, None of sizes. JSON values."""


def recipe(data: DataSection, vision: VisionSection) -> dict[str, Any]:
    """Everything that decides the bits of an image, as JSON values; bits of another recipe are refused."""
    augment = stored_recipe(data.augment)
    # Bits without augmentation have no such entry, as before there was any.
    return ({"augment": augment} if augment else {}) | {
        "tokenizer": _file_digest(tokenizer_weights_file(vision)),
        "num_bits": vision.num_bits,
        "block_side": vision.block_side,
        # Named where they are not those of all earlier bit shards.
        **{name: value for name in ("precision", "order") if (value := getattr(vision, name)) != _USUAL[name]},
        **({} if vision.latents == "bits" else _latents_recipe(vision)),
        "decode": DECODE_VERSION,
        "resize": data.resize,
        "max_upscale": data.max_upscale,
        "has_borders": [source.has_borders for source in data.active_sources],
        "resolutions": {
            str(resolution.side_px): resolution_buckets(resolution).tolist()
            for resolution in data.resolutions
            if resolution.share > 0
        },
    }


def _latents_recipe(vision: VisionSection) -> dict[str, Any]:
    return {"latents": vision.latents, "tokenizer_config": _file_digest(vae_config_file(vision))}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_filters(index: Index, data: DataSection) -> StoredFilters:
    """What decides which samples of a data set have bits, besides the recipe.

    Raises:
        DataError: a filter names a column that the index does not have.
    """
    found: StoredFilters = []
    for samples, source in zip(index.sources, data.active_sources, strict=True):
        filters = [
            [
                f"{rule.min} <= {rule.column} <= {rule.max}, missing: {rule.missing}",
                index.digests.get(SCORE + rule.column),
            ]
            for rule in SourceFilters(index, source, data.filters).rules
        ]
        if filters:
            found.append([samples.start, samples.stop, filters])
    return found


def recipe_sides_px(recipe: Mapping[str, Any]) -> list[int]:
    """`side_px` of the resolutions that a recipe encodes."""
    return [int(side_px) for side_px in recipe["resolutions"]]


def recipe_views(recipe: Mapping[str, Any]) -> int:
    """Views of each sample that a recipe encodes."""
    return int(recipe["augment"]["views"]) if "augment" in recipe else 1


def shard_file(row: int) -> str:
    """File name of the bit shard for a row of `Index.shards`."""
    return f"{row:06d}.tar"


def write_bit_shard(path: Path, meta: Mapping[str, Any], resolutions: Mapping[int, Sequence[Bits]]) -> None:
    """Writes the bit shard of one image shard; the file appears complete or not at all.

    Args:
        path: the file.
        meta: what the bits were made from (`shard_meta`).
        resolutions: `side_px` -> bits of every view of every sample of the shard.
    """
    longest_bytes = max(
        (sum(len(sample) for sample in samples if isinstance(sample, bytes)) for samples in resolutions.values()),
        default=0,
    )
    with replacing(path, is_shared=True) as aside, tarfile.open(aside, "w", format=_tar_format(longest_bytes)) as tar:
        _add(tar, META_NAME, json.dumps(meta).encode())
        for side_px, samples in resolutions.items():
            contents = [sample if isinstance(sample, bytes) else b"" for sample in samples]
            # The bits come first, so that their place does not depend on the tables.
            start = tar.offset + tarfile.BLOCKSIZE
            lengths = [len(content) for content in contents]
            table = np.zeros(len(contents), SHARD_ROW)
            table["start"] = start + np.cumsum([0, *lengths[:-1]])[: len(contents)]
            table["num_bytes"] = lengths
            table["checksum"] = [checksum32(content) for content in contents]
            table["error_code"] = [_error_code(sample) for sample in samples]
            _add(tar, f"{side_px}.bits", b"".join(contents))
            _add(tar, f"{side_px}.table", table.tobytes())


def read_tables(path: Path) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Meta and tables of a bit shard: `side_px` -> `SHARD_ROW` [samples * views].

    Raises:
        UnreadableError: the bit shard cannot be read now.
        DataError: it is missing, damaged or of another format.
    """
    again = "Delete it and run `bitdance encode` again."
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar if not member.name.endswith(".bits")}
            meta = json.loads(_content(tar, members[META_NAME]))
            if meta["format"] != FORMAT:
                raise DataError(f"{path}: a bit shard of format {meta['format']}; this version reads {FORMAT}. {again}")
            tables = {
                side_px: np.frombuffer(_content(tar, members[f"{side_px}.table"]), SHARD_ROW)
                for side_px in recipe_sides_px(meta["recipe"])
            }
            num_views = recipe_views(meta["recipe"])
            if any(len(table) != meta["num_samples"] * num_views for table in tables.values()):
                views = f", {num_views} views of each" if num_views > 1 else ""
                raise ValueError(f"a table has not the {meta['num_samples']} samples of the shard{views}")
    except (*MISSING, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no usable bit shard ({error!r}). {again}") from error
    except OSError as error:
        raise unreadable(path, error, _SETTING) from error
    return meta, tables


def shard_meta(index: Index, row: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a bit shard says about itself: the recipe, and from which image shard it was made."""
    samples = index.shard_samples(row)
    digest = hashlib.sha256()
    rows = slice(samples.start, samples.stop)
    for values in (index.places(rows), index.sizes_px(rows)):
        digest.update(np.ascontiguousarray(values).data)
    return {"format": FORMAT, "recipe": dict(recipe), "num_samples": len(samples), "samples": digest.hexdigest()}


def write_table(folder: Path, index: Index, recipe: Mapping[str, Any], filters: StoredFilters | None = None) -> None:
    """Joins the tables of all bit shards in a folder. After that, the data set can be trained on.

    Args:
        folder: of the bit shards.
        index: the data set.
        recipe: of the bits.
        filters: every sample that they keep, and that a resolution draws, has bits or a reason; None: not known.

    Raises:
        DataError: a bit shard is missing or damaged, or was made from other images or with another recipe.
    """
    # Until all tables are there, nothing may be trained on.
    (folder / TABLE_NAME).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        # A running job keeps the file that it has mapped, because a new one takes its name.
        asides = {
            side_px: stack.enter_context(replacing(_table_path(folder, side_px))) for side_px in recipe_sides_px(recipe)
        }
        num_views = recipe_views(recipe)
        num_rows = len(index) * num_views
        tables = {
            side_px: np.lib.format.open_memmap(aside, "w+", ROW, (num_rows,)) for side_px, aside in asides.items()
        }
        start = 0
        for row, entry in enumerate(index.shards):
            path = folder / shard_file(row)
            meta, parts = read_tables(path)
            if meta != shard_meta(index, row, recipe):
                raise DataError(
                    f"{path}: made from other images than those of {entry.path}, or with other settings. Delete it and "
                    "run `bitdance encode` again."
                )
            stop = start + entry.num_samples * num_views
            for side_px, table in tables.items():
                for field in SHARD_ROW.fields or ():
                    table[field][start:stop] = parts[side_px][field]
                table["shard"][start:stop] = row
            start = stop
        for table in tables.values():
            table.flush()
    values = {"format": FORMAT, "recipe": dict(recipe), "index": index.hash, "num_shards": len(index.shards)}
    if filters is not None:
        values["filters"] = filters
    write_text(folder / TABLE_NAME, json.dumps(values), is_shared=True)


class BitStore:
    """The bits of a data set, by sample; safe to use from several threads.

    Args:
        folder: folder that `bitdance encode` wrote.
        index: the data set.
        recipe: the recipe that the bits must have (`recipe`).

    Raises:
        UnreadableError: their tables cannot be read now.
        DataError: there are no bits, or they were made from other images or with another recipe.
    """

    def __init__(self, folder: str | Path, index: Index, recipe: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._index = index
        self._token_bytes = code_bytes(recipe["num_bits"], recipe.get("latents", "bits"))
        self._num_views = recipe_views(recipe)
        path = self._folder / TABLE_NAME
        again = "Run `bitdance encode` with this configuration."
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            found, index_hash, version = table["recipe"], table["index"], table["format"]
        except (*MISSING, ValueError, KeyError) as error:
            raise DataError(f"data.bits_dir: {path}: no bits are there ({error!r}). {again}") from error
        except OSError as error:
            raise unreadable(path, error, _SETTING) from error
        if version != FORMAT:
            raise DataError(
                f"data.bits_dir: {path}: bits of format {version}; this version reads {FORMAT}. Delete the folder. "
                f"{again}"
            )
        if index_hash != index.hash:
            raise DataError(
                f"data.bits_dir: {path}: of the data set with index {index_hash}, not {index.hash}. {again}"
            )
        # Entries of either: one that is only named where it is unusual differs by its absence.
        for name in {**recipe, **found}:
            made, wanted = found.get(name, _USUAL.get(name)), recipe.get(name, _USUAL.get(name))
            if made != wanted:
                raise DataError(f"data.bits_dir: {path}: made with {name} = {made}, now it is {wanted}. {again}")
        # Bits of earlier versions do not say them.
        self._filters: StoredFilters | None = table.get("filters")
        self._tables = {side_px: self._open(side_px) for side_px in recipe_sides_px(recipe)}
        # Samples come in random order: reading ahead would read a hundred times what is used.
        self._shards: OpenFiles[int] = OpenFiles(
            lambda row: f"{folder}/{shard_file(row)}", MAX_OPEN_SHARDS, reads_ahead=False
        )

    def read(self, sample: int, side_px: int, view: int = 0) -> np.ndarray:
        """uint8 [h * w, code bytes], the tokens of a view of a sample at a resolution, in the order of `vision.order`.

        Raises:
            SampleError: the image could not be encoded, or its bits cannot be read.
            DataError: the sample was left out when the shards were encoded.
        """
        # One lookup that gives plain numbers: reading the fields one by one takes five times as long.
        start, num_bytes, checksum, error_code, shard = self._tables[side_px].item(sample * self._num_views + view)
        if error_code != HAS_BITS:
            self._raise(sample, side_px, error_code)
        try:
            data = self._shards.read(shard, start, num_bytes)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise self._unreadable(shard, start, num_bytes, repr(error)) from error
        if checksum32(data) != checksum or len(data) != num_bytes:
            what = "they are damaged" if len(data) == num_bytes else "the file ends before that"
            raise self._unreadable(shard, start, num_bytes, what)
        return np.ndarray((num_bytes // self._token_bytes, self._token_bytes), np.uint8, data)

    def check_drawn(self, data: DataSection) -> None:
        """Refuses bits without samples that a run draws: those which other filters left out when they were encoded.

        The tables are searched only if the filters are not those of the bits.

        Raises:
            DataError: samples that a resolution draws have no bits; names how many, the first, and the filters.
        """
        now, then = stored_filters(self._index, data), self._filters
        if now == then:
            return
        for (source, side_px), eligible in select(self._index, data).eligible.items():
            count, first = 0, 0
            for lacking in self._lacking(self._index.sources[source], side_px, eligible):
                first = first if count else int(lacking[0])
                count += len(lacking)
            if count:
                raise DataError(
                    f"data.bits_dir: {self._folder / TABLE_NAME}: {count:,} of the {len(eligible):,} samples that are "
                    f"drawn at {side_px} px were left out when the shards were encoded, the first is "
                    f"{self._index.name(first)} of {self._index.shard_path(first)}. data.filters were "
                    f"{_in_words(then)} then and are {_in_words(now)} now. Run `bitdance encode` with this "
                    "configuration, which makes only the shards again that lack samples, or restore the filters."
                )

    def close(self) -> None:
        """Closes the open files, each as soon as the last read in it has ended."""
        self._shards.close()

    def _lacking(self, samples: range, side_px: int, eligible: EligibleSamples) -> Iterator[np.ndarray]:
        """int64 [n] each, those of the samples of a source that are drawn at a resolution and were not encoded."""
        table, num_views = self._tables[side_px], self._num_views
        for start in range(samples.start, samples.stop, _SAMPLES_AT_ONCE):
            stop = min(start + _SAMPLES_AT_ONCE, samples.stop)
            # All views of a sample are encoded, or none is.
            is_left_out = table["error_code"][start * num_views : stop * num_views : num_views] == NOT_ENCODED
            numbers = np.arange(start, stop)[is_left_out]
            lacking = numbers[eligible.contains(numbers - samples.start)]
            if len(lacking):
                yield lacking

    def _unreadable(self, shard: int, start: int, num_bytes: int, what: str) -> SampleError:
        path = self._folder / shard_file(shard)
        return SampleError(ErrorCause.READ_FAILED, f"bits, {path}, bytes {start}..{start + num_bytes}: {what}")

    def _raise(self, sample: int, side_px: int, error_code: int) -> NoReturn:
        if error_code == NOT_ENCODED:
            raise DataError(
                f"data.bits_dir: sample {self._index.name(sample)} of {self._index.shard_path(sample)} has no bits for "
                f"resolution {side_px} px: filters left it out when the shards were encoded. Run "
                "`bitdance encode` with this configuration."
            )
        raise SampleError(_CAUSES[error_code - 1], "when the shards were encoded")

    def _open(self, side_px: int) -> np.ndarray:
        path = _table_path(self._folder, side_px)
        again = "Run `bitdance encode` again."
        try:
            # As a plain array: reading a row of an np.memmap takes ten times as long.
            table = np.asarray(np.load(path, mmap_mode="r"))
        except (*MISSING, ValueError) as error:
            raise DataError(f"data.bits_dir: {path}: the table is damaged ({error}). {again}") from error
        except OSError as error:
            raise unreadable(path, error, _SETTING) from error
        num_rows = len(self._index) * self._num_views
        if table.dtype != ROW or table.shape != (num_rows,):
            raise DataError(
                f"data.bits_dir: {path}: the table has {table.shape} rows of {table.dtype}, not {num_rows} of {ROW}. "
                f"{again}"
            )
        return table


def check_bits(index: Index, config: RunConfig) -> None:
    """Compares the bit shards of a run with what it draws, so that what they lack is found before training.

    Args:
        index: the data set, divided into its sources.
        config: a run with `data.bits_dir`.

    Raises:
        DataError: there are no bits, they were made from other images or with another recipe, or they lack samples.
    """
    BitStore(config.data.bits_dir, index, recipe(config.data, config.vision)).check_drawn(config.data)


def _in_words(filters: StoredFilters | None) -> str:
    if filters is None:
        return "not stored"
    return repr([text for _, _, found in filters for text, _ in found])


def _tar_format(longest_bytes: int) -> int:
    """The format of a tar by its longest member: USTAR, or GNU's, whose headers take a block as well."""
    return tarfile.USTAR_FORMAT if longest_bytes < USTAR_BYTES else tarfile.GNU_FORMAT


def _error_code(sample: Bits) -> int:
    if isinstance(sample, bytes):
        return HAS_BITS
    return NOT_ENCODED if sample is None else 1 + _CAUSES.index(sample)


def _table_path(folder: Path, side_px: int) -> Path:
    return folder / f"{side_px}.table.npy"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member
    content = file.read()
    if len(content) != member.size:
        raise ValueError(f"member {member.name} is cut short")
    return content
