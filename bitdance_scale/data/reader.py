"""Reads samples by offset.

webdataset's own stream is not used, because a plan needs any sample at any time and a stream only gives the next one.
"""

from __future__ import annotations

from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.index.index import Index, Place
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.data.storage.stores import Stores


class ShardReader:
    """Reads images of shards by offset; safe to use from several threads.

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
        return self.read(index.place(sample))

    def read(self, place: Place) -> bytes:
        """The image file at a place.

        Raises:
            SampleError: the range cannot be read, or it does not have the checksum that it had when it was indexed.
        """
        begin, end = place.offset - BLOCK_BYTES, place.offset + place.num_bytes
        where = f"bytes {begin}..{end}"
        try:
            data = self._stores.read(place.path, begin, end - begin, place.tag)
        except ReadError as error:
            cause = ErrorCause.SHARD_CHANGED if error.is_changed else ErrorCause.READ_FAILED
            raise SampleError(cause, f"{where}: {error}") from error
        if len(data) < end - begin:
            raise SampleError(ErrorCause.READ_FAILED, f"{where}: the shard ends before them")
        if checksum32(data) != place.checksum:
            raise SampleError(
                ErrorCause.SHARD_CHANGED, f"{where}: they do not have the checksum that they had when they were indexed"
            )
        return data[BLOCK_BYTES:]

    def close(self) -> None:
        """Closes the open shards."""
        self._stores.close()
