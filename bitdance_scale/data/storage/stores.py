"""Where shards lie: files of this machine, or objects of an S3 store. Everything else reads ranges and asks no further.

A path with `s3://` in front is an object; any other path is a file.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitdance_scale.config.schema import S3Section
from bitdance_scale.errors import DataError

if TYPE_CHECKING:
    from bitdance_scale.data.storage.s3 import S3Store

S3_SCHEME = "s3://"


@dataclass(frozen=True)
class ShardState:
    """What tells whether a shard changed.

    Attributes:
        num_bytes: its length.
        tag: modification time in nanoseconds of a file, ETag of an object.
    """

    num_bytes: int
    tag: str


class ReadError(Exception):
    """A range could not be read, and trying again does not help; the message says why.

    Attributes:
        is_changed: whether the shard is another one than was asked for.
    """

    def __init__(self, message: str, is_changed: bool = False) -> None:
        super().__init__(message)
        self.is_changed = is_changed


class Stores:
    """Reads shards wherever they lie; safe to use from several threads, and picklable.

    Args:
        s3: how S3 is reached; its client is made at the first object that is asked for.
        max_open_files: local shards kept open.
    """

    def __init__(self, s3: S3Section | None = None, max_open_files: int = 128) -> None:
        self._s3_section = s3 or S3Section()
        self._lock = threading.Lock()
        self._s3: S3Store | None = None
        self._files = _Files(max_open_files)

    def __getstate__(self) -> S3Section:
        return self._s3_section

    def __setstate__(self, section: S3Section) -> None:
        self.__init__(section)

    def read(self, path: str, offset: int, num_bytes: int, tag: str = "") -> bytes:
        """Bytes `offset` .. `offset + num_bytes` of a shard; fewer where it ends.

        Args:
            path: file or `s3://bucket/key`.
            offset, num_bytes: the range.
            tag: of the object when it was indexed; files are told apart by their tar headers instead. Empty: any.

        Raises:
            ReadError: for good; passing troubles of a store are waited out.
        """
        if path.startswith(S3_SCHEME):
            return self._objects().read(path, offset, num_bytes, tag)
        return self._files.read(path, offset, num_bytes)

    def prepare(self, shards: Iterable[tuple[str, int]]) -> None:
        """Makes ready to read shards at random, so that what is wrong with a store's settings shows at once.

        Args:
            shards: path and length in bytes of each.

        Raises:
            ConfigError: those on S3 do not fit the cache.
            DataError: no client for S3 can be made, or its cache cannot be used.
        """
        num_bytes = sum(length for path, length in shards if path.startswith(S3_SCHEME))
        if num_bytes:
            self._objects().prepare(num_bytes)

    def states(self, paths: Sequence[str]) -> list[ShardState]:
        """The state of every shard.

        Raises:
            DataError: one does not exist or cannot be looked at.
        """
        remote = [path for path in paths if path.startswith(S3_SCHEME)]
        found = self._objects().states(remote) if remote else {}
        return [found[path] if path in found else _file_state(path) for path in paths]

    def list(self, prefix: str, is_flat: bool) -> list[str]:
        """Paths of all objects that begin with `s3://bucket/prefix`, sorted.

        Args:
            prefix: what they begin with.
            is_flat: whether those with another slash behind it are left out.

        Raises:
            DataError: the bucket cannot be listed.
        """
        return self._objects().list(prefix, is_flat)

    def close(self) -> None:
        """Forgets open files; each closes when the last read in it ends."""
        self._files.close()

    def _objects(self) -> S3Store:
        with self._lock:
            if self._s3 is None:
                # boto3 takes a second to import; runs on local shards do without.
                from bitdance_scale.data.storage.s3 import S3Store

                self._s3 = S3Store(self._s3_section)
            return self._s3


class _Files:
    """Open files, few at a time; the least recently used is closed first."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        try:
            # The name keeps the descriptor open until the read has ended, should another thread evict it.
            file = self._file(path)
            return os.pread(file.descriptor, num_bytes, offset)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(path)
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file


class _OpenFile:
    """A descriptor that closes with its last reference, so that eviction never closes it under a reading thread."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _file_state(path: str) -> ShardState:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot open the shard ({error.strerror}). Correct data.shards or restore the file."
        ) from error
    return ShardState(stat.st_size, str(stat.st_mtime_ns))
