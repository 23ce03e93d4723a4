"""A cache of objects on the disk of a node: blocks in files that all processes of the node share, limited in size.

A sample is about 100 kB somewhere in a shard, and samples are read in random order. One file per sample would mean
millions of files, so the cache keeps blocks of several megabytes: every byte of a data set crosses the network once per
node. This pays only if the whole data set fits. Otherwise a block would be evicted before its next sample is read;
`S3Store.prepare` refuses such a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from bitdance_scale.atomic_files import WRITING, write_bytes, write_text
from bitdance_scale.errors import DataError

logger = logging.getLogger(__name__)

_MAGIC = b"BDBLOCK1"
_HEADER = struct.Struct("<8sQ")
"""Magic and number of content bytes. The CRC-32s of the pages follow, then the content."""
_PAGE_BYTES = 1 << 16
_NUM_LOCKS = 256
_POLL_S = 0.01
# Making room scans the whole folder, so it frees more than one block.
_KEPT_SHARE = 0.95
# A use is recorded at most this often, so "least recently used" is this exact.
_TOUCH_S = 60.0


class BlockCache:
    """Blocks of objects in a folder; safe to use from several threads, processes and runs at once.

    If the disk fails or fills up later, the cache logs a warning and objects are read directly: the run goes on.

    Args:
        folder: on a disk of this node; created if missing.
        max_bytes: limit on the size of all files in it.
        block_bytes: how much is fetched and kept at once.
        patience_s: how long to wait for a block that another process is fetching; after that it is read directly.

    Attributes:
        num_fetches: blocks that this process has fetched.

    Raises:
        DataError: the folder cannot be created or written to.
    """

    def __init__(self, folder: str | Path, max_bytes: int, block_bytes: int, patience_s: float) -> None:
        self.num_fetches = 0
        self._folder = Path(folder)
        self._max_bytes, self._block_bytes, self._patience_s = max_bytes, block_bytes, patience_s
        self._has_counted = self._has_warned = False
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
            (self._folder / "locks" / "usage").touch()
        except OSError as error:
            raise DataError(
                f"data.s3.cache_dir={folder}: cannot be used ({error.strerror}). Name a folder on a disk of the node "
                "that all its processes may write to."
            ) from error

    def read(self, key: str, offset: int, num_bytes: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes `offset` .. `offset + num_bytes` of an object; fewer if the object ends before that.

        Args:
            key: identifies the object and its version.
            offset: first byte of the range.
            num_bytes: length of the range.
            fetch: reads a range (offset, number of bytes) of the object itself; what it raises is passed on.
        """
        parts: list[bytes] = []
        for block in range(offset // self._block_bytes, -(-(offset + num_bytes) // self._block_bytes)):
            start = block * self._block_bytes
            begin, end = max(offset - start, 0), min(offset + num_bytes - start, self._block_bytes)
            parts.append(self._read_block(self._path(key, block), start, begin, end, fetch))
            if len(parts[-1]) < end - begin:
                break
        return b"".join(parts)

    def _read_block(self, path: Path, start: int, begin: int, end: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes `begin` .. `end` of the block of the object that starts at `start`."""
        if (kept := self._kept(path, begin, end)) is not None:
            return kept
        with self._claim(str(int(path.name[:8], 16) % _NUM_LOCKS)) as is_held:
            if not is_held:
                return fetch(start + begin, end - begin)
            # The previous holder of the lock may have fetched it.
            if (kept := self._kept(path, begin, end)) is not None:
                return kept
            content = fetch(start, self._block_bytes)
            self.num_fetches += 1
            self._keep(path, content)
        return content[begin:end]

    def _kept(self, path: Path, begin: int, end: int) -> bytes | None:
        """Bytes `begin` .. `end` of a kept block; None if there is none. A damaged block is removed."""
        try:
            with open(path, "rb", buffering=0) as file:
                content, stat = _checked(file.fileno(), begin, end), os.fstat(file.fileno())
            if content is None:
                logger.warning("%s: the block is damaged; fetching it again", path)
                path.unlink()
            elif time.time() - stat.st_mtime > _TOUCH_S:
                os.utime(path)
            return content
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None

    def _path(self, key: str, block: int) -> Path:
        digest = hashlib.sha256(f"{key}\n{self._block_bytes}\n{block}".encode()).hexdigest()
        return self._folder / digest[:2] / digest[2:42]

    def _keep(self, path: Path, content: bytes) -> None:
        """Makes room for a block and writes it."""
        table = np.array([zlib.crc32(content[at : at + _PAGE_BYTES]) for at in range(0, len(content), _PAGE_BYTES)])
        data = _HEADER.pack(_MAGIC, len(content)) + table.astype("<u4").tobytes() + content
        try:
            with self._claim("usage") as is_held:
                if not is_held or len(data) > self._max_bytes:
                    return
                used = self._used_bytes()
                if used + len(data) > self._max_bytes:
                    used = self._make_room(int(_KEPT_SHARE * self._max_bytes) - len(data))
                write_bytes(path, data, is_durable=False)
                write_text(self._folder / "used_bytes", str(used + len(data)), is_durable=False)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("data.s3.cache_dir=%s: %s; reading without the cache", self._folder, error)
        self._has_warned = True

    def _used_bytes(self) -> int:
        """Size of all blocks, from the total that is kept beside them; every process adds it up itself once."""
        if self._has_counted:
            with contextlib.suppress(OSError, ValueError):
                return int((self._folder / "used_bytes").read_text(encoding="utf-8"))
        self._has_counted = True
        return self._make_room(self._max_bytes)

    def _make_room(self, max_bytes: int) -> int:
        """Removes the least recently used blocks and leftovers of dead processes; returns the bytes that remain."""
        blocks = []
        for folder in os.scandir(self._folder):
            if not folder.is_dir() or folder.name == "locks":
                continue
            for entry in os.scandir(folder):
                if entry.name.endswith(WRITING):
                    os.unlink(entry)
                else:
                    stat = entry.stat()
                    blocks.append((stat.st_mtime, stat.st_size, entry.path))
        used = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if used <= max_bytes:
                break
            os.unlink(path)
            used -= size
        return used

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """Holds a lock of the folder; yields False if it is not free in time. A process that dies frees its locks."""
        with contextlib.ExitStack() as stack:
            is_held = False
            try:
                # Closing the file releases the lock.
                file = stack.enter_context(open(self._folder / "locks" / name, "w", encoding="utf-8"))
                is_held = self._lock(file)
            except OSError as error:
                self._warn(error)
            yield is_held

    def _lock(self, file: IO[str]) -> bool:
        deadline_s = time.monotonic() + self._patience_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(_POLL_S)
        return False


def _checked(descriptor: int, begin: int, end: int) -> bytes | None:
    """Bytes `begin` .. `end` of an open block; None if the file is cut or one of their pages fails its checksum."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, num_bytes = _HEADER.unpack(header)
    num_pages = -(-num_bytes // _PAGE_BYTES)
    data_at = _HEADER.size + 4 * num_pages
    if magic != _MAGIC or os.fstat(descriptor).st_size != data_at + num_bytes:
        return None
    end = min(end, num_bytes)
    if begin >= end:
        return b""
    first, last = begin // _PAGE_BYTES, -(-end // _PAGE_BYTES)
    table = np.frombuffer(os.pread(descriptor, 4 * (last - first), _HEADER.size + 4 * first), "<u4")
    pages = os.pread(
        descriptor, min(last * _PAGE_BYTES, num_bytes) - first * _PAGE_BYTES, data_at + first * _PAGE_BYTES
    )
    for number, crc in enumerate(table.tolist()):
        if zlib.crc32(pages[number * _PAGE_BYTES : (number + 1) * _PAGE_BYTES]) != crc:
            return None
    return pages[begin - first * _PAGE_BYTES : end - first * _PAGE_BYTES]
