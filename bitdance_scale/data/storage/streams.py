"""Tars that can only be read from front to back: files, the output of commands (`pipe:`) and HTTP, through webdataset.

webdataset opens them and walks their members. By itself it ends without an error where a tar is cut in a header, where
a header is damaged or where a block is zeroed. So the bytes are watched on their way: a tar ends with an empty block,
and nothing comes after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

from bitdance_scale.config.data_schema import DataSource
from bitdance_scale.data.storage.shards import expand_braces, expand_shards
from bitdance_scale.errors import DataError

PIPE_SCHEME = "pipe:"
HTTP_SCHEMES = ("http://", "https://")
BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 1 << 28
"""No longer image is decoded (`images/limits.py`)."""
MAX_HEADER_BYTES = 1 << 20
"""Of names and attributes in a header of their own."""
_CHUNK_BYTES = 1 << 16
# Regular files, and the headers of GNU and pax that say more about the next one.
_EXTENSIONS = (b"L", b"K", b"x", b"g")
_WITH_CONTENT = (b"0", b"\0", b"7", *_EXTENSIONS)
_MANY_BYTES = 1 << 33
# gzip, bzip2, xz, zstd
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# A command that is told to stop because its reader has seen enough: SIGPIPE in a shell.
_BROKEN_PIPE_CODE = 141
_EXIT_WAIT_S = 1.0
_CURL = ("curl", "--connect-timeout", "30", "--retry", "10", "--retry-delay", "2", "-f", "-sS", "-L")


class BrokenStreamError(Exception):
    """A stream ended where its tar does not, or could not be opened."""


def is_stream(spec: str) -> bool:
    """Whether a path can only be read from front to back."""
    return spec.startswith((PIPE_SCHEME, *HTTP_SCHEMES))


def expand_streams(specs: Iterable[str], setting: str = "data.shards") -> list[str]:
    """The streams that a list names, each once: local tars as `expand_shards` gives them, commands and addresses.

    Braces are expanded in all of them (`pipe:aws s3 cp s3://bucket/{000..099}.tar -`).

    Raises:
        DataError: a spec names nothing, or credentials; a path on S3; curl is not installed.
    """
    found: list[str] = []
    for spec in specs:
        if not is_stream(spec):
            if "://" in spec:
                raise DataError(
                    f"{setting}: {spec!r}: data.mode = 'stream' reads local tars, http(s):// and pipe: only. Shards on "
                    "S3 can be indexed: set data.mode = 'indexed', or name a command such as 'pipe:aws s3 cp PATH -'."
                )
            found += expand_shards([spec], setting)
            continue
        found += expand_braces(spec, setting)
        if spec.startswith(HTTP_SCHEMES) and shutil.which("curl") is None:
            raise DataError(f"{setting}: {spec!r}: addresses are read by curl, which is not installed; install it")
    if not found:
        raise DataError(f"{setting} is empty: name at least one tar, address or command.")
    return list(dict.fromkeys(found))


def expand_stream_sources(sources: Sequence[DataSource]) -> list[list[str]]:
    """The streams of every source, as `expand_streams` gives them.

    Raises:
        DataError: as `expand_streams`.
    """
    return [
        expand_streams(source.shards, f"shards of source {source.name!r}" if source.name else "data.shards")
        for source in sources
    ]


class TarStream:
    """One tar, read from front to back. Iterate once, in one thread; `stop` may be called from another.

    Args:
        url: a local path, an address or `pipe:COMMAND`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._stream: Any = None
        self._is_stopped = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples in order: extension in lower case -> content, and `__key__`.

        Members of a sample must be neighbours, as webdataset has it. Of a member that comes twice in a sample, the
        first counts.

        Raises:
            BrokenStreamError: after the samples before it, where the tar is broken, the command failed or the server
                sent less than the whole.
        """
        try:
            self._stream = self._open()
            if self._is_stopped:
                raise ValueError("stopped")
            watched = _WatchedStream(self._stream)
            files = ({"__url__": self._url} | file for file in tar_file_iterator(watched))
            samples = group_by_keys(files, handler=_tolerate_duplicates)
            # The last one may lack members where the tar is cut.
            held: list[dict[str, Any]] = []
            for sample in samples:
                yield from held
                held = [sample]
            watched.check_end()
            if isinstance(self._stream, Pipe):
                self._stream.wait_for_child()
            yield from held
        except GeneratorExit:
            raise
        except Exception as error:  # tarfile, zlib, subprocesses and sockets raise nearly anything.
            raise BrokenStreamError(f"{type(error).__name__}: {error}{self._exit_code()}") from error
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the command that is being read; a read that waits for it returns."""
        self._is_stopped = True
        stream = self._stream
        if stream is None:
            return
        if isinstance(stream, Pipe):
            # Not after its end, when another process may have its number.
            if stream.proc.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(stream.proc.pid, signal.SIGKILL)
            # Its exit code says that it was killed.
            with contextlib.suppress(OSError):
                stream.close()
        else:
            stream.close()

    def _exit_code(self) -> str:
        """What the command says of its end, if it has ended."""
        if not isinstance(self._stream, Pipe) or self._is_stopped:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._stream.proc.wait(_EXIT_WAIT_S)
            return f" (the command ended with exit code {code})" if code else ""
        return ""

    def _open(self) -> Any:
        # A session of its own, so that a pipeline of commands can be ended as a whole.
        options = {"mode": "rb", "start_new_session": True, "ignore_status": [_BROKEN_PIPE_CODE]}
        if self._url.startswith(PIPE_SCHEME):
            return Pipe(self._url.removeprefix(PIPE_SCHEME), shell=True, **options)
        if self._url.startswith(HTTP_SCHEMES):
            return Pipe([*_CURL, self._url], **options)
        return gopen(self._url, "rb")


class _WatchedStream:
    """A stream that knows whether its reader stopped where a tar ends.

    It gives out one header at a time, or a part of the content after it, so that the reader never holds bytes that it
    has not looked at.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = memoryview(b"")
        self._header = b""
        self._content_bytes = 0
        self._num_given = 0
        self._has_ended = False

    def read(self, num_bytes: int = -1) -> bytes:
        """The next bytes, at most up to the next header; empty at the end of the stream."""
        if not self._buffer:
            self._buffer = memoryview(self._stream.read(_CHUNK_BYTES))
            if not self._num_given and bytes(self._buffer[:6]).startswith(_COMPRESSED):
                raise ValueError("is compressed; name a command instead, such as 'pipe:gzip -dc PATH'")
        limit = self._content_bytes or BLOCK_BYTES
        size = limit if num_bytes < 0 else min(num_bytes, limit)
        given, self._buffer = bytes(self._buffer[:size]), self._buffer[size:]
        self._num_given += len(given)
        self._has_ended |= not given
        if self._content_bytes:
            self._content_bytes -= len(given)
        elif given:
            self._header = given
            self._content_bytes = _content_bytes(given)
        return given

    def check_end(self) -> None:
        """Reads what is left, and fails unless it is the end of a tar.

        Raises:
            ValueError: the tar was cut, or goes on after a place that could not be read.
        """
        # The reader of a whole tar stops at the empty block, and asks for nothing after it.
        is_cut = self._has_ended or not self._header or bool(self._header.strip(b"\0"))
        place = self._num_given
        has_more = any(block.strip(b"\0") for block in iter(self.read, b""))
        if has_more:
            raise ValueError(f"the tar is damaged before byte {place} and goes on after it")
        if is_cut:
            raise ValueError(f"the tar ends at byte {place} without an end-of-archive mark, so it was cut")


def _content_bytes(header: bytes) -> int:
    """Bytes from a tar header to the next one; 0 if the next block must be looked at by itself.

    Raises:
        ValueError: more than any member has that training reads; the reader would hold it in memory as a whole.
    """
    kind = header[156:157]
    if len(header) < BLOCK_BYTES or kind not in _WITH_CONTENT:
        return 0
    try:
        # Sizes of 8 GiB and more are written in base 256.
        size = _MANY_BYTES if header[124] & 0x80 else int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return 0
    limit = MAX_HEADER_BYTES if kind in _EXTENSIONS else MAX_MEMBER_BYTES
    if size > limit:
        name = header[:100].partition(b"\0")[0].decode("utf-8", errors="backslashreplace")
        many = "8 GiB or more" if size == _MANY_BYTES else f"{size} bytes"
        raise ValueError(f"member {name!r} has {many}, the limit is {limit}")
    return max(0, -(-size // BLOCK_BYTES) * BLOCK_BYTES)


def _tolerate_duplicates(error: Exception) -> bool:
    """Goes on after a member that comes twice; webdataset would drop the rest of the tar for any other error."""
    if isinstance(error, ValueError) and "duplicate file name" in str(error):
        return True
    raise error
