"""Finds out what a path is: a folder of pictures, a folder with metadata, or Parquet files."""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.shard_writing.metadata_folder import TABLE_EXTENSIONS, MetadataFolder
from bitdance_scale.data.shard_writing.parquet import ParquetPictures
from bitdance_scale.data.shard_writing.picture_folder import PICTURE_EXTENSIONS, FoundFile, PictureFolder, list_files
from bitdance_scale.data.shard_writing.source import PictureSource
from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

_KINDS = (
    "It must be a folder of pictures with .txt captions beside them, a folder with metadata.jsonl, metadata.csv or "
    "metadata.parquet, or Parquet files that hold pictures"
)


def open_source(path: str | Path, caption: str = "", image: str = "") -> PictureSource:
    """The pictures of a path.

    Tables come first: a folder in which a `metadata.*` lies takes its pictures and captions from there. A folder of
    Parquet files is one that holds no picture files.

    Args:
        path: a folder, a Parquet file, or a `.jsonl` or `.csv` table whose folder holds the pictures.
        caption: column of the captions, where there are columns; empty: `text` or `caption`.
        image: column of the pictures or of their file names; empty: by its type or name.

    Raises:
        DataError: there is no such path, nothing to pack in it, or a table that cannot be used.
    """
    if str(path).startswith(S3_SCHEME) or "://" in str(path):
        raise DataError(f"{path}: only local files can be packed; copy or mount the source")
    path = Path(path)
    if path.is_file():
        extension = path.suffix[1:].lower()
        if extension == "parquet":
            return _not_empty(ParquetPictures(path.parent, [path], caption, image), path)
        if extension in TABLE_EXTENSIONS:
            files, _ = list_files(path.parent)
            return _not_empty(MetadataFolder(path.parent, [path.name], files, caption, image), path)
        raise DataError(f"{path}: a file of this kind cannot be packed. {_KINDS}.")
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder; correct SOURCE")
    files, num_hidden = list_files(path)
    return _not_empty(_of_folder(path, files, num_hidden, caption, image), path)


def _of_folder(path: Path, files: list[FoundFile], num_hidden: int, caption: str, image: str) -> PictureSource:
    tables = [file.name for file in files if Path(file.name).name in {f"metadata.{e}" for e in TABLE_EXTENSIONS}]
    if tables:
        parents = [Path(table).parent for table in tables]
        doubled = [table for table, parent in zip(tables, parents, strict=True) if parents.count(parent) > 1]
        if doubled:
            raise DataError(f"{path}: {' and '.join(doubled[:2])} lie in one folder; keep one of them")
        return MetadataFolder(path, tables, files, caption, image)
    if any(file.extension in PICTURE_EXTENSIONS for file in files):
        if caption or image:
            option = "--caption" if caption else "--image"
            raise DataError(f"{path}: {option} names a column, but there is no metadata.* and no Parquet; leave it out")
        return PictureFolder(path, files, num_hidden)
    parquets = [path / file.name for file in files if file.extension == "parquet"]
    if parquets:
        return ParquetPictures(path, parquets, caption, image)
    tars = [file.name for file in files if file.extension == "tar"]
    if tars:
        raise DataError(
            f"{path}: holds tars ({first_few(tars)}), which are shards already if they hold pictures: "
            f"bitdance index {path}"
        )
    raise DataError(f"{path}: holds no pictures ({len(files)} other files). {_KINDS}.")


def _not_empty(source: PictureSource, path: Path) -> PictureSource:
    if not len(source.num_bytes):
        raise DataError(f"{path}: this {source.kind} holds no pictures. {_KINDS}.")
    return source
