"""A client of S3: requests that are repeated until they succeed or cannot, lists of objects, boto3's errors in words.

boto3 retries a request that fails before its body, but not a body that breaks off. One loop here does both, for reads
(`s3.py`) and for whole files (`s3_files.py`).

Credentials come through boto3's own chain (environment, profile, instance role) and are never logged: an endpoint or a
proxy with credentials in its URL is refused, or hidden where boto3 names it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.credentials import WAY_OUT, find_credentials, hide_credentials
from bitdance_scale.data.storage.store_contract import ReadError, ShardState
from bitdance_scale.errors import DataError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_MAX_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 20.0
_WARN_AFTER_S = 30.0
_TEMPORARY_STATUSES = frozenset((408, 429, 500, 502, 503, 504, 509))
_CHANGED_STATUSES = frozenset((412,))
TEMPORARY_CODES = frozenset(
    {
        "BadDigest",
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "InternalError",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "SlowDown",
        "Throttling",
        "ThrottledException",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)
"""Codes of errors that a retry may mend, whatever the status: those that boto3, whose retries are off here, retries."""


@dataclass(frozen=True)
class SettingNames:
    """What the settings of a client are called in messages.

    Attributes:
        endpoint_url, profile: of its access.
        denied: what to do where the credentials do not allow a request.
        path: what names the objects.
        deadline: the seconds without progress after which a request is given up.
    """

    endpoint_url: str = "data.s3.endpoint_url"
    profile: str = "data.s3.profile"
    denied: str = "set AWS_PROFILE or data.s3.profile, or data.s3.anonymous=true"
    path: str = "data.shards"
    deadline: str = "data.s3.deadline_s"


class S3Client:
    """Requests to one S3 endpoint; safe to use from several threads.

    Args:
        section: endpoint, profile and deadlines.
        pause: sleeps for so many seconds; tests replace it.
        names: what the settings are called.

    Attributes:
        num_retries: requests that were repeated so far.
        boto: boto3's client, which does not retry.

    Raises:
        DataError: the section does not give a client, or an endpoint with credentials in its URL.
    """

    def __init__(
        self, section: S3Section, pause: Callable[[float], None] = time.sleep, names: SettingNames | None = None
    ) -> None:
        self.num_retries = 0
        self._names = names or SettingNames()
        self._deadline_s = section.deadline_s
        self._pause = pause
        self._lock = threading.Lock()
        _refuse_credentials(section.endpoint_url, self._names.endpoint_url)
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
            self.boto = session.client("s3", endpoint_url=section.endpoint_url or None, config=config)
        except (BotoCoreError, ValueError) as error:
            names = self._names
            raise DataError(
                f"{names.endpoint_url.rpartition('.')[0]}: cannot make a client for S3 ({error}). Correct "
                f"{names.endpoint_url} or {names.profile}."
            ) from error
        _refuse_credentials(self.boto.meta.endpoint_url, "the endpoint that boto3 found (AWS_ENDPOINT_URL, ~/.aws)")

    def fetch(self, path: str, offset: int, num_bytes: int, tag: str) -> bytes:
        """Bytes `offset` .. `offset + num_bytes` of an object; fewer if it ends before that.

        A broken range is resumed at the byte where it broke, and of the same object: `If-Match` refuses one that has
        replaced it.

        Args:
            path: `s3://BUCKET/KEY`.
            offset: first byte.
            num_bytes: length of the range.
            tag: ETag of the object; empty: of any.

        Raises:
            ReadError: the range cannot be read, and no other try would help.
        """
        if num_bytes == 0:
            return b""
        bucket, key = split_path(path)
        received = bytearray()
        what = f"{path}, bytes {offset}..{offset + num_bytes}"

        def fetch() -> bool:
            begin, end = offset + len(received), offset + num_bytes
            request: dict[str, Any] = {"Bucket": bucket, "Key": key, "Range": f"bytes={begin}-{end - 1}"}
            if tag:
                request["IfMatch"] = tag
            response = self.boto.get_object(**request)
            end = min(end, _total_bytes(response, begin))
            body = response["Body"]
            try:
                while begin < end and (chunk := body.read(min(_CHUNK_BYTES, end - begin))):
                    received.extend(chunk)
                    begin += len(chunk)
            finally:
                body.close()
            if begin < end:
                raise WrongResponse(f"the body ended {end - begin} bytes early")
            return True

        self.until_done(fetch, what, lambda: len(received))
        return bytes(received)

    def listed(self, prefix: str, is_flat: bool = False) -> dict[str, ShardState]:
        """Path -> state of all objects whose path begins with a prefix, 1000 per request.

        Args:
            prefix: `s3://BUCKET/` and the beginning of a key.
            is_flat: whether to leave out objects with a slash after the prefix.

        Raises:
            DataError: the bucket cannot be listed.
        """
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
            response = self.boto.list_objects_v2(**request)
            for entry in response.get("Contents", ()):
                found[f"{S3_SCHEME}{bucket}/{entry['Key']}"] = ShardState(entry["Size"], entry["ETag"])
            token = response.get("NextContinuationToken")
            return token is None

        try:
            self.until_done(page, f"list of {prefix}", lambda: len(found))
        except ReadError as error:
            raise DataError(str(error)) from error
        return found

    def until_done(self, attempt: Callable[[], bool], what: str, progress: Callable[[], int]) -> None:
        """Repeats an attempt until it returns True, with pauses that grow while nothing arrives (full jitter).

        Args:
            attempt: one request; returns whether everything has arrived.
            what: what is requested, for messages.
            progress: how much has arrived so far.

        Raises:
            ReadError: a failure that no retry can mend, or no progress for the deadline.
        """
        begun_s = warned_s = time.monotonic()
        num_failures = 0
        while True:
            before = progress()
            try:
                if attempt():
                    return
                continue
            except FAILURES as error:
                reason = _reason(error)
                if not _is_temporary(error):
                    status = _status(error)
                    hint = self._hint(403 if isinstance(error, _NO_CREDENTIALS) else status)
                    raise ReadError(f"{what}: {reason}: {hint}", status in _CHANGED_STATUSES) from error
            now_s = time.monotonic()
            if progress() > before:
                begun_s, num_failures = now_s, 0
            if now_s - begun_s > self._deadline_s:
                raise ReadError(
                    f"{what}: nothing arrived for {now_s - begun_s:.0f} s ({self._names.deadline}), last error: "
                    f"{reason}"
                )
            if now_s - warned_s > _WARN_AFTER_S:
                logger.warning("%s: still trying after %.0f s: %s", what, now_s - begun_s, reason)
                warned_s = now_s
            with self._lock:
                self.num_retries += 1
            self._pause(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**num_failures)))
            num_failures += 1

    def _hint(self, status: int | None) -> str:
        """What to do about a status that another try would not change."""
        if status == 403:
            return f"the credentials of boto3 do not allow it; {self._names.denied}"
        if status == 404:
            return f"it does not exist; correct {self._names.path}"
        return "it is shorter than it was" if status == 416 else "another try would not help"


class WrongResponse(Exception):
    """A response does not hold what was asked for, and the next one may."""


FAILURES = (ClientError, BotoCoreError, HTTPError, OSError, WrongResponse)
"""What a request or its body raises when it fails; code and status say whether a retry can help."""
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError)
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
        raise WrongResponse(f"asked for bytes from {begin} on, the response holds {content_range!r}")
    return int(total)


def _is_temporary(error: Exception) -> bool:
    """Whether a retry can help: by the code of the error, else by its status."""
    if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") in TEMPORARY_CODES:
        return True
    status = _status(error)
    return status is None or status in _TEMPORARY_STATUSES


def _status(error: Exception) -> int | None:
    """HTTP status of a failure; None if it has none, such as a broken connection."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, BotoCoreError) and not isinstance(error, _CONNECTION_ERRORS):
        # No credentials or an invalid bucket name: no request was sent.
        return 0
    return None


def _reason(error: Exception) -> str:
    """What went wrong, without the signature of the request or the password of a proxy."""
    if isinstance(error, ClientError):
        detail = error.response.get("Error", {})
        return f"{detail.get('Code', 'error')} ({detail.get('Message', '')}), status {_status(error)}"
    return hide_credentials(f"{type(error).__name__}: {error}")


def _refuse_credentials(url: str, where: str) -> None:
    found = "a user or password before the host" if "@" in url else find_credentials(url)
    if found is not None:
        raise DataError(f"{where} holds {found}: URLs are stored and shown; {WAY_OUT}.")
