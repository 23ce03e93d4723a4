"""Reads samples by offset from shards that stay open; home of webdataset's shard-list rules.

webdataset's own stream is not used: a plan needs any sample at any time, and a stream cannot be resumed at one.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict

from webdataset.shardlists import expand_urls

from bitdance_scale.data.ledger import FaultCause, SampleFault
from bitdance_scale.data.tar_scan import BLOCK_BYTES
from bitdance_scale.errors import DataError


def expand_braces(spec: str, setting: str = "data.shards") -> list[str]:
    """Shard names of a webdataset brace list such as `data/{00000..00099}.tar`; `setting` is what messages call it.

    Raises:
        DataError: unbalanced braces or an unset `${variable}`.
    """
    try:
        return expand_urls(spec)
    # webdataset asserts that the variables are set.
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{setting}: {spec!r} is no valid brace list ({error}). Write it as 'data/{{00000..00099}}.tar'."
        ) from error


class ShardReader:
    """Reads byte ranges of local shards; safe to use from several threads.

    Args:
        max_open_shards: shards kept open; the least recently used is closed first.
    """

    def __init__(self, max_open_shards: int = 128) -> None:
        self._max_open_shards = max_open_shards
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def read(self, path: str, offset: int, num_bytes: int, header_crc: int) -> bytes:
        """The content of one tar member.

        Args:
            path: the shard.
            offset: first byte of the content; the 512 bytes before it are the member's tar header.
            num_bytes: length of the content.
            header_crc: CRC-32 of that header when the shard was indexed.

        Raises:
            SampleFault: the range cannot be read, or the header there is no longer the indexed one.
        """
        place = f"bytes {offset}..{offset + num_bytes}"
        try:
            shard = self._shard(path)
            data = os.pread(shard.descriptor, BLOCK_BYTES + num_bytes, offset - BLOCK_BYTES)
        except OSError as error:
            raise SampleFault(FaultCause.READ_FAILED, f"{place}: {error.strerror}") from error
        if len(data) < BLOCK_BYTES + num_bytes:
            raise SampleFault(FaultCause.READ_FAILED, f"{place}: the shard ends before them")
        if zlib.crc32(data[:BLOCK_BYTES]) != header_crc:
            raise SampleFault(FaultCause.SHARD_CHANGED, f"{place}: not behind the tar header that was indexed")
        return data[BLOCK_BYTES:]

    def close(self) -> None:
        """Forgets the open shards; each closes when the last read in it ends."""
        with self._lock:
            self._open.clear()

    def _shard(self, path: str) -> _OpenShard:
        with self._lock:
            shard = self._open.get(path)
            if shard is None:
                shard = self._open[path] = _OpenShard(path)
                if len(self._open) > self._max_open_shards:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return shard


class _OpenShard:
    """A descriptor that closes with its last reference, so that eviction never closes it under a reading thread."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
