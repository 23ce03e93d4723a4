"""Bit shards: the vision tokens of a data set, encoded ahead of training.

Every image shard of the index gets one bit shard: a tar of a few large members. For each resolution they hold the
packed bits of all samples one after the other (1, 4 or 16 KiB each at 256, 512 or 1024 px), where each sample begins,
its CRC-32, and why a sample has no bits. A table of all shards, in memory-mapped columns, finds any sample with one
lookup and one read.

Sizes, captions, scores and the plan still come from the index. Training on bits therefore draws the same samples at the
same buckets as training on images, and a run can change from one to the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bitdance_scale.atomic_files import replacing, write_text
from bitdance_scale.config.schema import DataSection, VisionSection
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import DECODE_VERSION
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.buckets import resolution_buckets
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError

FORMAT = 1
TABLE_NAME = "bits.json"
META_NAME = "meta.json"
HAS_BITS, NOT_ENCODED = 0, 255
_CAUSES = tuple(ErrorCause)
_COLUMNS: dict[str, tuple[str, type]] = {
    "start": ("start", np.int64),
    "num_bytes": ("num_bytes", np.int32),
    "crc": ("crc", np.uint32),
    # Bit shards of version 0.1 have this name on disk, and they are still read.
    "error_code": ("fault", np.uint8),
}
"""Field of `BitTable` -> its name on disk and its type."""
# The key of the resolutions in the recipe, which bit shards of version 0.1 have on disk.
_RESOLUTIONS_KEY = "classes"

Bits = bytes | ErrorCause | None
"""One sample at one resolution: its packed bits, why it has none, or None if the resolution does not draw it."""


@dataclass(frozen=True)
class BitTable:
    """Where the bits of n samples at one resolution lie.

    Attributes:
        start: int64 [n], first byte in the tar.
        num_bytes: int32 [n], length of the bits.
        crc: uint32 [n], CRC-32 of the bits.
        error_code: uint8 [n], `HAS_BITS`, `NOT_ENCODED`, or 1 + the number of an `ErrorCause`.
    """

    start: np.ndarray
    num_bytes: np.ndarray
    crc: np.ndarray
    error_code: np.ndarray


def recipe(data: DataSection, vision: VisionSection) -> dict[str, Any]:
    """Everything that decides the bits of an image, as JSON values; bits of another recipe are refused."""
    with open(vision.weights_path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "tokenizer": digest,
        "num_bits": vision.num_bits,
        "block_side": vision.block_side,
        "decode": DECODE_VERSION,
        "max_upscale": data.max_upscale,
        "has_borders": [source.has_borders for source in data.active_sources],
        _RESOLUTIONS_KEY: {
            str(resolution.side_px): resolution_buckets(resolution).tolist()
            for resolution in data.resolutions
            if resolution.share > 0
        },
    }


def recipe_sides_px(recipe: Mapping[str, Any]) -> list[int]:
    """`side_px` of the resolutions that a recipe encodes."""
    return [int(side_px) for side_px in recipe[_RESOLUTIONS_KEY]]


def shard_file(row: int) -> str:
    """File name of the bit shard for a row of `Index.shards`."""
    return f"{row:06d}.tar"


def write_bit_shard(path: Path, meta: Mapping[str, Any], resolutions: Mapping[int, Sequence[Bits]]) -> None:
    """Writes the bit shard of one image shard; the file appears complete or not at all.

    Args:
        path: the file.
        meta: what the bits were made from (`shard_meta`).
        resolutions: `side_px` -> bits of every sample of the shard.
    """
    with replacing(path, is_shared=True) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, META_NAME, json.dumps(meta).encode())
        for side_px, samples in resolutions.items():
            contents = [sample if isinstance(sample, bytes) else b"" for sample in samples]
            # The bits come first, so that their place does not depend on the tables.
            start = tar.offset + tarfile.BLOCKSIZE
            lengths = np.fromiter(map(len, contents), np.int32, len(contents))
            columns = {
                "start": start + np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])[: len(contents)],
                "num_bytes": lengths,
                "crc": np.fromiter(map(zlib.crc32, contents), np.uint32, len(contents)),
                "error_code": np.fromiter(map(_error_code, samples), np.uint8, len(contents)),
            }
            _add(tar, f"{side_px}.bits", b"".join(contents))
            for field, (name, dtype) in _COLUMNS.items():
                _add(tar, f"{side_px}.{name}", columns[field].astype(dtype).tobytes())


def read_tables(path: Path) -> tuple[dict[str, Any], dict[int, BitTable]]:
    """Meta and tables (`side_px` -> table) of a bit shard.

    Raises:
        DataError: the bit shard is missing or damaged.
    """
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar if not member.name.endswith(".bits")}
            meta = json.loads(_content(tar, members[META_NAME]))
            tables = {
                side_px: BitTable(
                    **{
                        field: np.frombuffer(_content(tar, members[f"{side_px}.{name}"]), dtype)
                        for field, (name, dtype) in _COLUMNS.items()
                    }
                )
                for side_px in recipe_sides_px(meta["recipe"])
            }
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no usable bit shard ({error!r}). Delete it and run `bitdance encode` again."
        ) from error
    return meta, tables


def shard_meta(index: Index, row: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a bit shard says about itself: the recipe, and from which image shard it was made."""
    samples = index.shard_samples(row)
    digest = hashlib.sha256()
    rows = slice(samples.start, samples.stop)
    for values in (index.places(rows), index.sizes_px(rows)):
        digest.update(np.ascontiguousarray(values).data)
    return {"format": FORMAT, "recipe": dict(recipe), "num_samples": len(samples), "samples": digest.hexdigest()}


def write_table(folder: Path, index: Index, recipe: Mapping[str, Any]) -> None:
    """Joins the tables of all bit shards in a folder. After that, the data set can be trained on.

    Raises:
        DataError: a bit shard is missing or damaged, or was made from other images or with another recipe.
    """
    columns = {
        (side_px, field): _create(folder, side_px, field, len(index))
        for side_px in recipe_sides_px(recipe)
        for field in _COLUMNS
    }
    start = 0
    for row, entry in enumerate(index.shards):
        path = folder / shard_file(row)
        meta, tables = read_tables(path)
        if meta != shard_meta(index, row, recipe):
            raise DataError(
                f"{path}: made from other images than those of {entry.path}, or with other settings. Delete it and run "
                "`bitdance encode` again."
            )
        stop = start + entry.num_samples
        for (side_px, field), column in columns.items():
            column[start:stop] = getattr(tables[side_px], field)
        start = stop
    for column in columns.values():
        column.flush()
    table = {"format": FORMAT, "recipe": dict(recipe), "index": index.hash, "num_shards": len(index.shards)}
    write_text(folder / TABLE_NAME, json.dumps(table), is_shared=True)


class BitStore:
    """The bits of a data set, by sample; safe to use from several threads.

    Args:
        folder: folder that `bitdance encode` wrote.
        index: the data set.
        recipe: the recipe that the bits must have (`recipe`).

    Raises:
        DataError: there are no bits, or they were made from other images or with another recipe.
    """

    def __init__(self, folder: str | Path, index: Index, recipe: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._index = index
        self._stores = Stores()
        self._token_bytes = recipe["num_bits"] // 8
        path = self._folder / TABLE_NAME
        again = "Run `bitdance encode` with this configuration."
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            found, index_hash = table["recipe"], table["index"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"data.bits_dir: {path}: no bits are there ({error!r}). {again}") from error
        if index_hash != index.hash:
            raise DataError(
                f"data.bits_dir: {path}: of the data set with index {index_hash}, not {index.hash}. {again}"
            )
        for name, value in recipe.items():
            if found.get(name) != value:
                shown = "resolutions" if name == _RESOLUTIONS_KEY else name
                raise DataError(
                    f"data.bits_dir: {path}: made with {shown} = {found.get(name)}, now it is {value}. {again}"
                )
        self._tables = {side_px: self._open(side_px) for side_px in recipe_sides_px(recipe)}
        self._paths = [str(self._folder / shard_file(row)) for row in range(len(index.shards))]

    def read(self, sample: int, side_px: int) -> np.ndarray:
        """uint8 [h * w, C / 8], the tokens of a sample at a resolution, in block raster order.

        Raises:
            SampleError: the image could not be encoded, or its bits cannot be read.
            DataError: the sample was left out when the shards were encoded.
        """
        table = self._tables[side_px]
        error_code = int(table.error_code[sample])
        if error_code != HAS_BITS:
            self._raise(sample, side_px, error_code)
        start, num_bytes = int(table.start[sample]), int(table.num_bytes[sample])
        try:
            data = self._stores.read(self._paths[self._index.shard_row(sample)], start, num_bytes)
        except ReadError as error:
            raise SampleError(ErrorCause.READ_FAILED, f"bits, bytes {start}..{start + num_bytes}: {error}") from error
        if len(data) != num_bytes or zlib.crc32(data) != table.crc[sample]:
            raise SampleError(ErrorCause.READ_FAILED, f"bits, bytes {start}..{start + num_bytes}: they are damaged")
        return np.frombuffer(data, np.uint8).reshape(-1, self._token_bytes)

    def close(self) -> None:
        """Closes the open files."""
        self._stores.close()

    def _raise(self, sample: int, side_px: int, error_code: int) -> NoReturn:
        if error_code == NOT_ENCODED:
            raise DataError(
                f"data.bits_dir: sample {self._index.name(sample)} of {self._index.shard_path(sample)} has no bits for "
                f"resolution {side_px} px: filters left it out when the shards were encoded. Run "
                "`bitdance encode` with this configuration."
            )
        raise SampleError(_CAUSES[error_code - 1], "when the shards were encoded")

    def _open(self, side_px: int) -> BitTable:
        try:
            return BitTable(**{field: _mapped(_column_path(self._folder, side_px, field)) for field in _COLUMNS})
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.bits_dir: {self._folder}: the table is damaged ({error}). Run `bitdance encode` again."
            ) from error


def _error_code(sample: Bits) -> int:
    if isinstance(sample, bytes):
        return HAS_BITS
    return NOT_ENCODED if sample is None else 1 + _CAUSES.index(sample)


def _create(folder: Path, side_px: int, field: str, length: int) -> np.memmap:
    return np.lib.format.open_memmap(_column_path(folder, side_px, field), "w+", _COLUMNS[field][1], (length,))


def _mapped(path: Path) -> np.ndarray:
    # As a plain array: reading one number from an np.memmap takes ten times as long.
    return np.asarray(np.load(path, mmap_mode="r"))


def _column_path(folder: Path, side_px: int, field: str) -> Path:
    return folder / f"{side_px}.{_COLUMNS[field][0]}.npy"


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
