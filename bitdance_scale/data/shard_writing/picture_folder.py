"""A folder of pictures, with captions in `.txt` files and records in `.json` files of the same stem.

Pictures are found by the extension of their names, in any case, in nested folders, through symbolic links. Names that
start with a dot are left out. The order is that of the bytes of the paths, on every machine.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitdance_scale.atomic_files import is_storage_fault
from bitdance_scale.data.captions import MAX_TEXT_BYTES
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.data.shard_writing.captions import NO_CAPTION, Caption, caption_of_bytes
from bitdance_scale.data.shard_writing.columns import record_columns
from bitdance_scale.data.shard_writing.source import SkippedPicture, SourcePicture, digest_of, kind_of_file
from bitdance_scale.errors import DataError, printable

PICTURE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp dib tif tiff jp2 j2k avif heic heif".split()  # noqa: SIM905 (one line)
)
_BESIDE_EXTENSIONS = frozenset({"txt", "json"})


class FoundFile(NamedTuple):
    """A file in a folder: its path from there, with slashes, and its size; -1 if it cannot be told."""

    name: str
    num_bytes: int

    @property
    def stem(self) -> str:
        """The path without the extension."""
        return os.path.splitext(self.name)[0]

    @property
    def extension(self) -> str:
        """The extension in lower case, without its dot."""
        return os.path.splitext(self.name)[1][1:].lower()


def list_files(folder: Path) -> tuple[list[FoundFile], int]:
    """All files below a folder by the bytes of their paths, and how many names were left out for their leading dot.

    A folder that several links lead to is entered once.

    Raises:
        DataError: a folder cannot be read.
        OSError: of storage that is failing.
    """
    found: list[FoundFile] = []
    num_hidden = 0
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        num_hidden += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=os.fsencode)
        prefix = os.path.relpath(parent, folder).replace(os.sep, "/") + "/"
        prefix = prefix.removeprefix("./")
        shown_names = (name for name in files if not name.startswith("."))
        found += [FoundFile(prefix + name, _num_bytes(os.path.join(parent, name))) for name in shown_names]
    return sorted(found, key=lambda file: os.fsencode(file.name)), num_hidden


def read_picture_file(path: Path) -> bytes | SkippedPicture:
    """The bytes of a picture; or why they cannot be had, now and later.

    Raises:
        OSError: of storage that is failing, which may pass: a picture that is only out of reach must not be skipped.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if is_storage_fault(error):
            raise
        cause = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable_file"
        return SkippedPicture(cause, error.strerror or str(error))


class PictureFolder:
    """The pictures below a folder, and what lies beside them (a `PictureSource`).

    Args:
        folder: the folder.
        files: all that is in it, as `list_files` gives it.
        num_hidden: names that were left out.

    Attributes:
        names: path of each picture from the folder.
    """

    kind = "folder of pictures"

    def __init__(self, folder: Path, files: list[FoundFile], num_hidden: int) -> None:
        self._folder = folder
        self._pictures = [file for file in files if file.extension in PICTURE_EXTENSIONS]
        self.names = [file.name for file in self._pictures]
        stems = {file.stem for file in self._pictures}
        beside = [file for file in files if file.extension in _BESIDE_EXTENSIONS and file.stem in stems]
        # Of `a.TXT` and `a.txt` the last in the order counts.
        self._captions = {file.stem: file for file in beside if file.extension == "txt"}
        self._records = {file.stem: file for file in beside if file.extension == "json"}
        self.num_bytes = np.array([max(file.num_bytes, 0) for file in self._pictures], np.int64)
        used = {*self._pictures, *self._captions.values(), *self._records.values()}
        self.digest = digest_of(text for file in sorted(used) for text in (file.name, str(file.num_bytes)))
        self.left_out = _left_out(files, used, num_hidden)

    def can_start_at(self, position: int) -> bool:
        """Anywhere."""
        return True

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`."""
        for file in self._pictures[start:stop]:
            content = read_picture_file(self._folder / file.name)
            yield SourcePicture(printable(file.name), content, self._caption(file), self._record(file))

    def without_caption(self) -> Iterator[str]:
        """The pictures without a `.txt` file."""
        return (printable(file.name) for file in self._pictures if file.stem not in self._captions)

    def _caption(self, picture: FoundFile) -> Caption:
        file = self._captions.get(picture.stem)
        if file is None:
            return NO_CAPTION
        try:
            with open(self._folder / file.name, "rb") as opened:
                # What is longer is no caption, and is not read.
                return caption_of_bytes(opened.read(4 * MAX_TEXT_BYTES + 1))
        except OSError as error:
            if is_storage_fault(error):
                raise
            return NO_CAPTION if isinstance(error, FileNotFoundError) else Caption("", ErrorCause.INVALID_CAPTION)

    def _record(self, picture: FoundFile) -> dict[str, Any]:
        file = self._records.get(picture.stem)
        if file is None:
            return {}
        try:
            record = json.loads((self._folder / file.name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            if is_storage_fault(error):
                raise
            return {}
        return record_columns(record) if isinstance(record, dict) else {}


def _left_out(files: list[FoundFile], used: set[FoundFile], num_hidden: int) -> dict[str, int]:
    counts = Counter(kind_of_file(file.extension) for file in files if file not in used)
    return dict(sorted(counts.items())) | ({"hidden": num_hidden} if num_hidden else {})


def _num_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        # A link that leads nowhere: reading it says so.
        return -1


def _refuse_folder(error: OSError) -> None:
    if is_storage_fault(error):
        raise error
    raise DataError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); make it readable, or move it away"
    ) from error
