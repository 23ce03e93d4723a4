"""Reads samples by offset.

webdataset's own stream is not used, because a plan needs any sample at any time and a stream only gives the next one.
"""

from __future__ import annotations

import zlib

from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.data.storage.stores import Stores


class ShardReader:
    """Reads members of shards by offset; safe to use from several threads.

    Args:
        stores: how to read shards; None: with default settings.
    """

    def __init__(self, stores: Stores | None = None) -> None:
        self._stores = stores or Stores()

    def image(self, index: Index, sample: int) -> bytes:
        """The image file of a sample.

        Raises:
            SampleError: it cannot be read, or it is no longer the one that was indexed.
        """
        entry = index.shards[index.shard[sample]]
        offset, num_bytes = int(index.image_offset[sample]), int(index.image_bytes[sample])
        return self.read(entry.path, offset, num_bytes, int(index.header_crc[sample]), entry.tag)

    def read(self, path: str, offset: int, num_bytes: int, header_crc: int, tag: str = "") -> bytes:
        """The content of one tar member.

        Args:
            path: the shard.
            offset: first byte of the content; the 512 bytes before it are the tar header of the member.
            num_bytes: length of the content.
            header_crc: CRC-32 of that header when the shard was indexed.
            tag: tag of the shard when it was indexed (`Stores.read`).

        Raises:
            SampleError: the range cannot be read, or its tar header is no longer the one that was indexed.
        """
        place = f"bytes {offset}..{offset + num_bytes}"
        try:
            data = self._stores.read(path, offset - BLOCK_BYTES, BLOCK_BYTES + num_bytes, tag)
        except ReadError as error:
            cause = ErrorCause.SHARD_CHANGED if error.is_changed else ErrorCause.READ_FAILED
            raise SampleError(cause, f"{place}: {error}") from error
        if len(data) < BLOCK_BYTES + num_bytes:
            raise SampleError(ErrorCause.READ_FAILED, f"{place}: the shard ends before them")
        if zlib.crc32(data[:BLOCK_BYTES]) != header_crc:
            raise SampleError(ErrorCause.SHARD_CHANGED, f"{place}: their tar header is not the indexed one")
        return data[BLOCK_BYTES:]

    def close(self) -> None:
        """Closes the open shards."""
        self._stores.close()
