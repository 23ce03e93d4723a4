"""Reads ranges of shards on S3, through a cache on the node where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.storage.block_cache import BlockCache
from bitdance_scale.data.storage.s3_client import S3Client
from bitdance_scale.data.storage.store_contract import ShardState
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.wording import file_size


class S3Store(S3Client):
    """The shards of one S3 endpoint; safe to use from several threads.

    Args:
        section: endpoint, profile, deadlines and cache.
        pause: sleeps for so many seconds; tests replace it.

    Attributes:
        cache: the cache on this node; None without `data.s3.cache_dir`.

    Raises:
        DataError: the section does not give a client, or its cache cannot be used.
    """

    def __init__(self, section: S3Section, pause: Callable[[float], None] = time.sleep) -> None:
        super().__init__(section, pause)
        self._section = section
        self.cache: BlockCache | None = None
        if section.cache_dir:
            max_bytes, block_bytes = int(section.cache_gb * 1e9), section.cache_block_mb << 20
            self.cache = BlockCache(section.cache_dir, max_bytes, block_bytes, section.deadline_s)

    def read(self, path: str, offset: int, num_bytes: int, tag: str) -> bytes:
        """As `Stores.read`; goes through the cache if there is one and `tag` identifies the object."""
        if self.cache is None or not tag or num_bytes == 0:
            return self.fetch(path, offset, num_bytes, tag)
        key = f"{self.boto.meta.endpoint_url}\n{path}\n{tag}"
        return self.cache.read(key, offset, num_bytes, partial(self.fetch, path, tag=tag))

    def prepare(self, num_bytes: int) -> None:
        """Refuses a cache that is smaller than all shards together.

        Args:
            num_bytes: size of all shards on S3.

        Raises:
            ConfigError: the cache is smaller.
        """
        section = self._section
        if self.cache is not None and num_bytes > section.cache_gb * 1e9:
            raise ConfigError(
                f"data.s3.cache_gb={section.cache_gb:g}: the shards on S3 have {file_size(num_bytes)}. They must all "
                f"fit, because samples are read in random order: each would fetch {section.cache_block_mb} MiB again. "
                "Raise data.s3.cache_gb, or set data.s3.cache_dir='' to read without a cache."
            )

    def states(self, paths: Sequence[str]) -> dict[str, ShardState]:
        """Path -> state, found by listing the folders of the paths, 1000 objects per request.

        Raises:
            DataError: an object does not exist, or its bucket cannot be listed.
        """
        found: dict[str, ShardState] = {}
        for folder in dict.fromkeys(path.rpartition("/")[0] + "/" for path in paths):
            found |= self.listed(folder, is_flat=True)
        for path in paths:
            if path not in found:
                raise DataError(f"{path}: there is no such object. Correct data.shards or restore the object.")
        return {path: found[path] for path in paths}

    def list(self, prefix: str, is_flat: bool) -> list[str]:
        """As `Stores.list`."""
        return sorted(self.listed(prefix, is_flat))
