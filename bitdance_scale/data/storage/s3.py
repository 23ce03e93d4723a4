"""Reads ranges of S3 objects through boto3, and retries what may succeed later: refusals, resets, truncated bodies.

boto3 retries a request that fails before its body, but not a body that breaks off. One loop here does both. It resumes
a broken range at the byte where it broke, and of the same object: `If-Match` refuses an object that has replaced it.

Credentials come through boto3's own chain (environment, profile, instance role) and are never logged.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from bitdance_scale.config.schema import S3Section
from bitdance_scale.data.storage.block_cache import BlockCache
from bitdance_scale.data.storage.store_contract import S3_SCHEME, ReadError, ShardState
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.wording import file_size

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_MAX_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 20.0
_WARN_AFTER_S = 30.0
_TEMPORARY_CODES = frozenset((408, 429, 500, 502, 503, 504))
_CHANGED_CODES = frozenset((412,))
_HINTS = {
    403: "the credentials of boto3 do not allow it; set AWS_PROFILE or data.s3.profile, or data.s3.anonymous=true",
    404: "it does not exist; correct data.shards",
    416: "it is shorter than when it was indexed",
}


class S3Store:
    """The objects of one S3 endpoint; safe to use from several threads.

    Args:
        section: endpoint, profile, deadlines and cache.
        pause: sleeps for so many seconds; tests replace it.

    Attributes:
        num_retries: requests that were repeated so far.
        cache: the cache on this node; None without `data.s3.cache_dir`.

    Raises:
        DataError: the section does not give a client, or its cache cannot be used.
    """

    def __init__(self, section: S3Section, pause: Callable[[float], None] = time.sleep) -> None:
        self.num_retries = 0
        self._section = section
        self._pause = pause
        self._lock = threading.Lock()
        config = Config(
            # This module does all retries, those of bodies too.
            retries={"total_max_attempts": 1},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=section.read_timeout_s,
            max_pool_connections=_MAX_CONNECTIONS,
            signature_version=botocore.UNSIGNED if section.anonymous else None,
        )
        try:
            session = boto3.Session(profile_name=section.profile or None)
            self._client = session.client("s3", endpoint_url=section.endpoint_url or None, config=config)
        except (BotoCoreError, ValueError) as error:
            raise DataError(f"data.s3: cannot make a client for S3 ({error}). Correct data.s3.") from error
        self.cache: BlockCache | None = None
        if section.cache_dir:
            max_bytes, block_bytes = int(section.cache_gb * 1e9), section.cache_block_mb << 20
            self.cache = BlockCache(section.cache_dir, max_bytes, block_bytes, section.deadline_s)

    def read(self, path: str, offset: int, num_bytes: int, tag: str) -> bytes:
        """As `Stores.read`; goes through the cache if there is one and `tag` identifies the object."""
        if num_bytes == 0:
            return b""
        if self.cache is None or not tag:
            return self._fetch(path, offset, num_bytes, tag)
        key = f"{self._client.meta.endpoint_url}\n{path}\n{tag}"
        return self.cache.read(key, offset, num_bytes, partial(self._fetch, path, tag=tag))

    def _fetch(self, path: str, offset: int, num_bytes: int, tag: str) -> bytes:
        bucket, key = split_path(path)
        received = bytearray()
        what = f"{path}, bytes {offset}..{offset + num_bytes}"

        def fetch() -> bool:
            begin, end = offset + len(received), offset + num_bytes
            request: dict[str, Any] = {"Bucket": bucket, "Key": key, "Range": f"bytes={begin}-{end - 1}"}
            if tag:
                request["IfMatch"] = tag
            response = self._client.get_object(**request)
            end = min(end, _total_bytes(response, begin))
            body = response["Body"]
            try:
                while begin < end and (chunk := body.read(min(_CHUNK_BYTES, end - begin))):
                    received.extend(chunk)
                    begin += len(chunk)
            finally:
                body.close()
            if begin < end:
                raise _WrongResponse(f"the body ended {end - begin} bytes early")
            return True

        self._until_done(fetch, what, lambda: len(received))
        return bytes(received)

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
            found |= self._listed(folder, is_flat=True)
        for path in paths:
            if path not in found:
                raise DataError(f"{path}: there is no such object. Correct data.shards or restore the object.")
        return {path: found[path] for path in paths}

    def list(self, prefix: str, is_flat: bool) -> list[str]:
        """As `Stores.list`."""
        return sorted(self._listed(prefix, is_flat))

    def _listed(self, prefix: str, is_flat: bool) -> dict[str, ShardState]:
        bucket, key = split_path(prefix)
        found: dict[str, ShardState] = {}
        token: str | None = None

        def page() -> bool:
            nonlocal token
            request: dict[str, Any] = {"Bucket": bucket, "Prefix": key}
            if is_flat:
                request["Delimiter"] = "/"
            if token:
                request["ContinuationToken"] = token
            response = self._client.list_objects_v2(**request)
            for entry in response.get("Contents", ()):
                found[f"{S3_SCHEME}{bucket}/{entry['Key']}"] = ShardState(entry["Size"], entry["ETag"])
            token = response.get("NextContinuationToken")
            return token is None

        try:
            self._until_done(page, f"list of {prefix}", lambda: len(found))
        except ReadError as error:
            raise DataError(str(error)) from error
        return found

    def _until_done(self, attempt: Callable[[], bool], what: str, progress: Callable[[], int]) -> None:
        """Repeats an attempt until it returns True, with pauses that grow while nothing arrives (full jitter).

        Args:
            attempt: one request; returns whether everything has arrived.
            what: what is requested, for messages.
            progress: how much has arrived so far.

        Raises:
            ReadError: a failure that no retry can mend, or no progress for `data.s3.deadline_s`.
        """
        begun_s = warned_s = time.monotonic()
        num_failures = 0
        while True:
            before = progress()
            try:
                if attempt():
                    return
                continue
            except _FAILURES as error:
                reason = _reason(error)
                code = _status(error)
                if code is not None and code not in _TEMPORARY_CODES:
                    hint = _HINTS.get(code, "another try would not help")
                    raise ReadError(f"{what}: {reason}: {hint}", code in _CHANGED_CODES) from error
            now_s = time.monotonic()
            if progress() > before:
                begun_s, num_failures = now_s, 0
            if now_s - begun_s > self._section.deadline_s:
                raise ReadError(
                    f"{what}: nothing arrived for {now_s - begun_s:.0f} s (data.s3.deadline_s), last error: {reason}"
                )
            if now_s - warned_s > _WARN_AFTER_S:
                logger.warning("%s: still trying after %.0f s: %s", what, now_s - begun_s, reason)
                warned_s = now_s
            with self._lock:
                self.num_retries += 1
            self._pause(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**num_failures)))
            num_failures += 1


class _WrongResponse(Exception):
    """A response does not hold the range that was asked for."""


_FAILURES = (ClientError, BotoCoreError, HTTPError, OSError, _WrongResponse)
"""What a request or its body raises when it fails; the status says whether a retry can help."""
_CONNECTION_ERRORS = (HTTPClientError, BotoConnectionError, IncompleteReadError)
"""The errors of boto3 that come from the connection and not from the request."""


def split_path(path: str) -> tuple[str, str]:
    """(bucket, key) of `s3://BUCKET/KEY`.

    Raises:
        DataError: the path names no bucket.
    """
    bucket, _, key = path.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{path}: the path names no bucket. Write s3://BUCKET/KEY.")
    return bucket, key


def _total_bytes(response: dict[str, Any], begin: int) -> int:
    """Length of the object, from the response to a request for a range that starts at `begin`."""
    content_range = response.get("ContentRange", "")
    span, _, total = content_range.removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(begin) or not total.isdigit():
        raise _WrongResponse(f"asked for bytes from {begin} on, the response holds {content_range!r}")
    return int(total)


def _status(error: Exception) -> int | None:
    """HTTP status of a failure; None if it has none, such as a broken connection."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, BotoCoreError) and not isinstance(error, _CONNECTION_ERRORS):
        # No credentials or an invalid bucket name: no request was sent.
        return 0
    return None


def _reason(error: Exception) -> str:
    """What went wrong, without the signature of the request."""
    if isinstance(error, ClientError):
        detail = error.response.get("Error", {})
        return f"{detail.get('Code', 'error')} ({detail.get('Message', '')}), status {_status(error)}"
    return f"{type(error).__name__}: {error}"
