"""Walks the headers of a tar file without touching the data between them.

The standard tarfile module and webdataset's stream both end quietly where a tar is cut or damaged, which loses the
samples behind that point for ever; here every such place is a DataError that names it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from bitdance_scale.errors import DataError

BLOCK_BYTES = 512
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_REGULAR_TYPES = (b"0", b"\0", b"7")
_DATALESS_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file in a tar.

    Attributes:
        name: its path in the tar.
        offset: first byte of its content in the tar; its header is the 512 bytes before.
        num_bytes: length of its content.
        header_crc: CRC-32 of its header (name, size, times, owner), by which a reader notices a replaced shard.
    """

    name: str
    offset: int
    num_bytes: int
    header_crc: int


def scan_members(path: str) -> Iterator[Member]:
    """Yields the regular files of a tar (ustar, GNU or pax), in file order.

    Raises:
        DataError: the tar is missing, cut, has a damaged header or data behind its end-of-archive mark; the message
            names file and byte.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path}: cannot open the shard ({error.strerror}). Correct data.shards or restore the file."
        ) from error
    try:
        yield from _walk(path, descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _walk(path: str, descriptor: int, file_bytes: int) -> Iterator[Member]:
    offset = 0
    overrides: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, BLOCK_BYTES, offset)
        if len(header) < BLOCK_BYTES:
            raise _damage(path, offset, "the tar ends without an end-of-archive mark, so it was cut")
        if header == _ZERO_BLOCK:
            _check_end(path, descriptor, offset)
            return
        if not _is_checksum_right(header):
            raise _damage(path, offset, "the tar header fails its checksum")
        kind = header[156:157]
        num_bytes = 0 if kind in _DATALESS_TYPES else _size(path, offset, header, overrides)
        content = offset + BLOCK_BYTES
        end = content + -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if end > file_bytes:
            member = f"member {_name(header, overrides)!r} of {num_bytes} bytes"
            raise _damage(path, offset, f"{member} reaches past the end of the file ({file_bytes} bytes): it was cut")
        if kind in _REGULAR_TYPES:
            yield Member(_name(header, overrides), content, num_bytes, zlib.crc32(header))
            overrides = {}
        elif kind == b"L":
            overrides["path"] = _text(os.pread(descriptor, num_bytes, content))
        elif kind == b"x":
            overrides |= _pax_records(path, offset, os.pread(descriptor, num_bytes, content))
        elif kind in (b"g", b"K"):
            pass
        elif kind in _DATALESS_TYPES:
            overrides = {}
        else:
            raise _damage(path, offset, f"tar member type {kind!r} is not supported")
        offset = end


def _damage(path: str, offset: int, problem: str) -> DataError:
    return DataError(
        f"{path}: byte {offset}: {problem}. Fetch or write the shard again, or remove it from data.shards."
    )


def _is_checksum_right(header: bytes) -> bool:
    """The checksum field counts as eight spaces (POSIX ustar)."""
    try:
        stored = int(header[148:156].rstrip(b"\0 ") or b"-1", 8)
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 0x20


def _size(path: str, offset: int, header: bytes, overrides: dict[str, str]) -> int:
    try:
        if "size" in overrides:
            size = int(overrides["size"])
        elif header[124] & 0x80:
            # GNU base-256 for members of 8 GiB and more.
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise _damage(path, offset, "the tar header holds no valid size") from error
    if size < 0:
        raise _damage(path, offset, "the tar header holds a negative size")
    return size


def _name(header: bytes, overrides: dict[str, str]) -> str:
    if "path" in overrides:
        return overrides["path"]
    name = _text(header[:100])
    # Only POSIX ustar has a prefix field; GNU headers ("ustar  ") keep other things there.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", errors="surrogateescape")


def _pax_records(path: str, offset: int, content: bytes) -> dict[str, str]:
    """Records are "<length> <key>=<value>\\n", the length counting the whole record."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length_text, separator, rest = content.partition(b" ")
        if not separator or not length_text.isdigit() or int(length_text) <= len(length_text) + 1:
            raise _damage(path, offset, "the pax header is malformed")
        record = rest[: int(length_text) - len(length_text) - 1]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        records[_text(key)] = _text(value)
        content = content[int(length_text) :]
    return records


def _check_end(path: str, descriptor: int, offset: int) -> None:
    """Everything behind the first zero block must be padding: a zeroed block in the middle is damage, not the end."""
    position = offset
    while chunk := os.pread(descriptor, _READ_BYTES, position):
        rest = chunk.lstrip(b"\0")
        if rest:
            problem = f"an empty header, but data goes on at byte {position + len(chunk) - len(rest)}"
            raise _damage(path, offset, problem)
        position += len(chunk)
