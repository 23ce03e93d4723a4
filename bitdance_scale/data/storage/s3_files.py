"""Whole files to and from S3: what goes to an object in parts, and what comes back is compared with its digest.

In memory is one part at a time. A part that fails is sent again; an object appears only when its last part has arrived.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.storage.s3_client import (
    FAILURES,
    TEMPORARY_CODES,
    S3Client,
    SettingNames,
    WrongResponse,
    split_path,
)
from bitdance_scale.data.storage.store_contract import ReadError, WriteError

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""Bytes of a part; S3 takes parts from 5 MiB on, and fewer bytes for the last one."""
_CHECKSUM = "CRC32"
_MAX_PARTS = 10_000
_MAX_DELETED = 1000


class SendingRate:
    """Keeps what a process sends below a rate, on average; for one thread.

    Args:
        bytes_per_s: the rate; 0: no limit.
        pause: sleeps for so many seconds; tests replace it.
        clock: seconds that pass; tests replace it.
    """

    def __init__(
        self,
        bytes_per_s: float,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s, self._pause, self._clock = bytes_per_s, pause, clock
        self._free_s = clock()

    def wait(self, num_bytes: int) -> None:
        """Returns when so many bytes may be sent; what was not sent in idle time is not made up for."""
        if self._bytes_per_s <= 0:
            return
        now_s = self._clock()
        if self._free_s > now_s:
            self._pause(self._free_s - now_s)
        self._free_s = max(self._free_s, now_s) + num_bytes / self._bytes_per_s


class S3Files(S3Client):
    """Files as objects of one S3 endpoint. One thread may write at a time; reading and listing is free.

    Args:
        section: endpoint, profile and deadlines; it has no cache.
        names: what the settings are called in messages.
        bytes_per_s: most that is sent, on average; 0: no limit.
        pause: sleeps for so many seconds; tests replace it.

    Raises:
        DataError: the section does not give a client.
    """

    def __init__(
        self,
        section: S3Section,
        names: SettingNames,
        *,
        bytes_per_s: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(section, pause, names)
        self.rate = SendingRate(bytes_per_s, pause)
        # boto3 gives every part a checksum, unless AWS_REQUEST_CHECKSUM_CALCULATION=when_required (for stores that do
        # not know them). S3 wants their kind announced, and the checksums again at the end.
        calculation = getattr(self.boto.meta.config, "request_checksum_calculation", None)
        self._checksum = {"ChecksumAlgorithm": _CHECKSUM} if calculation == "when_supported" else {}

    def read(self, path: str, num_bytes: int) -> bytes:
        """An object that is small enough for memory, of a size known beforehand.

        Raises:
            ReadError: it does not exist, or cannot be read.
        """
        return self.fetch(path, 0, num_bytes, "")

    def read_file(self, path: str, into: Path, num_bytes: int) -> str:
        """Writes an object to a new file, whose folder is made if absent, a part at a time.

        Args:
            path: the object.
            into: the file.
            num_bytes: its size, known beforehand.

        Returns:
            The hexadecimal SHA-256 of what was written.

        Raises:
            ReadError: it does not exist, cannot be read, or has another size.
            OSError: of the file system.
        """
        into.parent.mkdir(parents=True, exist_ok=True)
        digest, done = hashlib.sha256(), 0
        with into.open("wb") as file:
            while done < num_bytes:
                part = self.fetch(path, done, min(PART_BYTES, num_bytes - done), "")
                if not part:
                    raise ReadError(f"{path}: has {done} bytes, {num_bytes} were written")
                digest.update(part)
                file.write(part)
                done += len(part)
        return digest.hexdigest()

    def write(self, path: str, content: bytes) -> None:
        """Makes or replaces a small object in one request, and so at once.

        Raises:
            WriteError: it cannot be written.
        """
        bucket, key = split_path(path)
        self._send(lambda: self.boto.put_object(Bucket=bucket, Key=key, Body=content), path, len(content))

    def write_file(self, path: str, file: Path, goes_on: Callable[[], None] = lambda: None) -> None:
        """Makes or replaces an object of a file, in parts if it is larger than one.

        Args:
            path: the object.
            file: the file.
            goes_on: called before every part; an error that it raises ends the writing.

        Raises:
            WriteError: it cannot be written; the object is as it was.
            OSError: of the file system, such as a file that was deleted.
        """
        num_bytes = file.stat().st_size
        part_bytes = max(PART_BYTES, -(-num_bytes // _MAX_PARTS))
        if num_bytes <= part_bytes:
            goes_on()
            self.write(path, file.read_bytes())
            return
        bucket, key = split_path(path)
        where: dict[str, Any] = {"Bucket": bucket, "Key": key}
        begin = {**where, **self._checksum}
        where["UploadId"] = self._send(lambda: self.boto.create_multipart_upload(**begin), path, 0)["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            with file.open("rb", buffering=0) as source:
                while content := source.read(part_bytes):
                    goes_on()
                    parts.append(self._send_part(path, where, len(parts) + 1, content))
            self._complete(path, where, parts, num_bytes)
        except BaseException:
            self._abort(where)
            raise

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes objects; those that are not there count as deleted.

        Raises:
            WriteError: some cannot be deleted.
        """
        keys: dict[str, list[str]] = {}
        for path in paths:
            bucket, key = split_path(path)
            keys.setdefault(bucket, []).append(key)
        for bucket, named in keys.items():
            for begin in range(0, len(named), _MAX_DELETED):
                self._delete(bucket, named[begin : begin + _MAX_DELETED])

    def _delete(self, bucket: str, keys: list[str]) -> None:
        request = {"Bucket": bucket, "Delete": {"Objects": [{"Key": key} for key in keys], "Quiet": True}}

        def delete() -> Any:
            answer = self.boto.delete_objects(**request)
            for error in answer.get("Errors", ()):
                if error.get("Code") in TEMPORARY_CODES:
                    raise WrongResponse(f"{error.get('Key')} was not deleted ({error['Code']})")
            return answer

        answer = self._send(delete, f"{len(keys)} objects of {bucket}", 0)
        if errors := answer.get("Errors"):
            raise WriteError(f"{S3_SCHEME}{bucket}/{errors[0].get('Key')}: not deleted ({errors[0].get('Code')})")

    def _send_part(self, path: str, where: dict[str, Any], number: int, content: bytes) -> dict[str, Any]:
        def send() -> Any:
            return self.boto.upload_part(**where, **self._checksum, PartNumber=number, Body=content)

        answer = self._send(send, f"{path}, part {number}", len(content))
        kept = {name: answer[name] for name in ("ETag", f"Checksum{_CHECKSUM}") if name in answer}
        return {"PartNumber": number, **kept}

    def _complete(self, path: str, where: dict[str, Any], parts: list[dict[str, Any]], num_bytes: int) -> None:
        request = {**where, "MultipartUpload": {"Parts": parts}}
        try:
            self._send(lambda: self.boto.complete_multipart_upload(**request), path, 0)
        except WriteError:
            # The answer to a request that succeeded may have been lost: then there is nothing left to complete.
            state = self.listed(path).get(path)
            if state is None or state.num_bytes != num_bytes or not state.tag.endswith(f'-{len(parts)}"'):
                raise

    def _abort(self, where: dict[str, Any]) -> None:
        try:
            self.boto.abort_multipart_upload(**where)
        except FAILURES:
            # The bucket's rule for parts without an object removes them later.
            logger.debug("parts of %s were left", where["Key"], exc_info=True)

    def _send(self, request: Callable[[], Any], what: str, num_bytes: int) -> Any:
        """The answer to a request that sends so many bytes; repeated as reads are."""
        answers: list[Any] = []

        def attempt() -> bool:
            self.rate.wait(num_bytes)
            answers.append(request())
            return True

        try:
            self.until_done(attempt, what, lambda: 0)
        except ReadError as error:
            raise WriteError(str(error)) from error
        return answers[-1]
