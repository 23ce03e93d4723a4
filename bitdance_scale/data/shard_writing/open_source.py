"""Finds out what a path is: a folder of pictures or of classes, one with metadata, Parquet files, a tar of tars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.shard_writing.class_tar import ClassTar
from bitdance_scale.data.shard_writing.classes import PicturesOfClasses
from bitdance_scale.data.shard_writing.metadata_folder import TABLE_EXTENSIONS, MetadataFolder
from bitdance_scale.data.shard_writing.parquet import ParquetPictures
from bitdance_scale.data.shard_writing.picture_folder import PICTURE_EXTENSIONS, FoundFile, PictureFolder, list_files
from bitdance_scale.data.shard_writing.source import PictureSource
from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

Source = TypeVar("Source", bound=PictureSource)
_KINDS = (
    "It must be a folder of pictures with .txt captions beside them, a folder with metadata.jsonl, metadata.csv or "
    "metadata.parquet, Parquet files that hold pictures, or a .tar that holds a .tar of pictures for every class"
)


def open_source(
    path: str | Path, caption: str = "", image: str = "", *, has_classes: bool = False, class_map: Path | None = None
) -> PictureSource:
    """The pictures of a path.

    Tables come first: a folder in which a `metadata.*` lies takes its pictures and captions from there. A folder of
    Parquet files is one that holds no picture files.

    Args:
        path: a folder, a Parquet file, a `.jsonl` or `.csv` table whose folder holds the pictures, or a `.tar` that
            holds a `.tar` for every class.
        caption: column of the captions, where there are columns; empty: `text` or `caption`.
        image: column of the pictures or of their file names; empty: by its type or name.
        has_classes: whether the first folders of pictures are their classes; those of a tar are.
        class_map: file with the numbers of the classes (`config/class_map.py`); None: the sorted names.

    Raises:
        ConfigError: the class map cannot be used.
        DataError: there is no such path, nothing to pack in it, or a table that cannot be used.
    """
    if str(path).startswith(S3_SCHEME) or "://" in str(path):
        raise DataError(f"{path}: only local files can be packed; copy or mount the source")
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".tar":
        _refuse_columns(path, caption, image)
        tar = _not_empty(ClassTar(path), path)
        return PicturesOfClasses(path, tar.kind, tar, tar.class_names, class_map)
    if has_classes or class_map is not None:
        return _folder_of_classes(path, caption, image, class_map)
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


def _folder_of_classes(path: Path, caption: str, image: str, class_map: Path | None) -> PictureSource:
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; correct SOURCE")
    if not path.is_dir():
        raise DataError(f"{path}: --classes needs a folder with a folder per class, or a tar with a tar per class")
    _refuse_columns(path, caption, image)
    files, num_hidden = list_files(path)
    if tables := _tables(files):
        raise DataError(
            f"{path}: holds {tables[0]}, which says what the pictures are; pack it without --classes and --class-map, "
            "or move the table away"
        )
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    folder = _not_empty(PictureFolder(path, files, num_hidden), path)
    return PicturesOfClasses(path, "folder of classes", folder, folders, class_map)


def _tables(files: list[FoundFile]) -> list[str]:
    return [file.name for file in files if Path(file.name).name in {f"metadata.{e}" for e in TABLE_EXTENSIONS}]


def _refuse_columns(path: Path, caption: str, image: str) -> None:
    if caption or image:
        option = "--caption" if caption else "--image"
        raise DataError(f"{path}: {option} names a column, but there is no metadata.* and no Parquet; leave it out")


def _of_folder(path: Path, files: list[FoundFile], num_hidden: int, caption: str, image: str) -> PictureSource:
    if tables := _tables(files):
        parents = [Path(table).parent for table in tables]
        doubled = [table for table, parent in zip(tables, parents, strict=True) if parents.count(parent) > 1]
        if doubled:
            raise DataError(f"{path}: {' and '.join(doubled[:2])} lie in one folder; keep one of them")
        return MetadataFolder(path, tables, files, caption, image)
    if any(file.extension in PICTURE_EXTENSIONS for file in files):
        _refuse_columns(path, caption, image)
        return PictureFolder(path, files, num_hidden)
    parquets = [path / file.name for file in files if file.extension == "parquet"]
    if parquets:
        return ParquetPictures(path, parquets, caption, image)
    tars = [file.name for file in files if file.extension == "tar"]
    if tars:
        raise DataError(
            f"{path}: holds tars ({first_few(tars)}), which are shards already if they hold pictures: "
            f"bitdance index {path}. Of a tar that holds a tar for every class, name the tar itself as SOURCE"
        )
    raise DataError(f"{path}: holds no pictures ({len(files)} other files). {_KINDS}.")


def _not_empty(source: Source, path: Path) -> Source:
    if not len(source.num_bytes):
        raise DataError(f"{path}: this {source.kind} holds no pictures. {_KINDS}.")
    return source
