"""Reads ranges of shards, whether they are local files or S3 objects; nothing above this module sees the difference.

A path that begins with `s3://` names an object; any other path names a file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.storage.open_files import OpenFiles
from bitdance_scale.data.storage.store_contract import ReadError, ShardState
from bitdance_scale.errors import DataError

if TYPE_CHECKING:
    from bitdance_scale.data.storage.s3 import S3Store


class Stores:
    """Reads shards wherever they lie; safe to use from several threads, and picklable.

    Args:
        s3: how to reach S3; the client is made when the first object is read.
        max_open_files: local shards kept open at a time.
    """

    def __init__(self, s3: S3Section | None = None, max_open_files: int = 128) -> None:
        self._s3_section = s3 or S3Section()
        self._max_open_files = max_open_files
        self._lock = threading.Lock()
        self._s3: S3Store | None = None
        self._files: OpenFiles[str] = OpenFiles(os.fspath, max_open_files)

    def __reduce__(self) -> tuple[type[Stores], tuple[S3Section, int]]:
        # Open files and a client stay in their process.
        return Stores, (self._s3_section, self._max_open_files)

    def read(self, path: str, offset: int, num_bytes: int, tag: str = "") -> bytes:
        """Bytes `offset` .. `offset + num_bytes` of a shard; fewer if the shard ends before that.

        Args:
            path: a file or `s3://BUCKET/KEY`.
            offset: first byte of the range.
            num_bytes: length of the range.
            tag: `ShardState.tag` of the object when it was indexed; another object is refused. Empty: any object. Files
                ignore it: their readers compare tar headers.

        Raises:
            ReadError: the range cannot be read. Temporary failures of S3 are retried first (`data.s3.deadline_s`), and
                so are faults of local storage, three times.
        """
        if path.startswith(S3_SCHEME):
            return self._objects().read(path, offset, num_bytes, tag)
        try:
            return self._files.read(path, offset, num_bytes)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error

    def prepare(self, shards: Iterable[tuple[str, int]]) -> None:
        """Checks before the first read that these shards can be read in random order.

        Args:
            shards: path and length in bytes of each shard.

        Raises:
            ConfigError: the shards on S3 do not fit the cache.
            DataError: the S3 client cannot be made, or its cache cannot be used.
        """
        num_bytes = sum(length for path, length in shards if path.startswith(S3_SCHEME))
        if num_bytes:
            self._objects().prepare(num_bytes)

    def states(self, paths: Sequence[str]) -> list[ShardState]:
        """The state of every shard, in the order of `paths`.

        Raises:
            DataError: a shard does not exist or cannot be accessed.
        """
        remote = [path for path in paths if path.startswith(S3_SCHEME)]
        found = self._objects().states(remote) if remote else {}
        return [found[path] if path in found else _file_state(path) for path in paths]

    def list(self, prefix: str, is_flat: bool) -> list[str]:
        """Paths of all objects whose path begins with a prefix, sorted.

        Args:
            prefix: `s3://BUCKET/` and the beginning of a key.
            is_flat: whether to leave out objects with a slash after the prefix.

        Raises:
            DataError: the bucket cannot be listed.
        """
        return self._objects().list(prefix, is_flat)

    def close(self) -> None:
        """Closes the open files, each as soon as the last read in it has ended."""
        self._files.close()

    def _objects(self) -> S3Store:
        with self._lock:
            if self._s3 is None:
                # boto3 takes a second to import, which runs on local shards do not need.
                from bitdance_scale.data.storage.s3 import S3Store

                self._s3 = S3Store(self._s3_section)
            return self._s3


def _file_state(path: str) -> ShardState:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot open the shard ({error.strerror}). Correct data.shards or restore the file."
        ) from error
    return ShardState(stat.st_size, str(stat.st_mtime_ns))
