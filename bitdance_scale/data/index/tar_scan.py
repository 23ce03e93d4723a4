"""Walks the headers of a tar, and goes on after places where the tar is broken.

The standard tarfile module and webdataset's stream both stop without an error where a tar is cut or damaged, so all
samples after that place would be missing. Here every such place is recorded, and the walk goes on at the next valid
header.

A tar is read in windows, so local files and objects on S3 are walked in the same way. A window starts at a header and
holds the members after it whole, except for one that is longer than a window. Nearly all headers of a data set are
plain. A run of plain headers is followed by their sizes alone and then checked at once; every other header is handled
by itself.

Whatever a tar claims, the walk takes time and memory in proportion to its length: names, extended headers and the list
of errors have limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 512
WINDOW_BYTES = 4 << 20
MAX_TAR_ERRORS = 100
"""So many places of a shard are kept; the others are counted."""
ReadRange = Callable[[int, int], bytes]
"""(offset, number of bytes) -> these bytes; fewer at the end of the tar."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_MAGIC = b"ustar"
_REGULAR_KINDS = frozenset(b"0\0007")
_DATALESS_KINDS = frozenset(b"123456")
_HARD_LINK, _SYMBOLIC_LINK, _LONG_NAME, _LONG_TARGET, _PAX = b"12LKx"
_LINK_TARGET = slice(157, 257)
# Longer than any path a file system has. Extended headers may carry attributes beside the path.
_MAX_NAME_BYTES = 1 << 16
_MAX_PAX_BYTES = 1 << 20
_MAX_LENGTH_DIGITS = 20
_SMALL_WINDOW_BYTES = 1 << 12
_SHORT_RUN, _LONG_RUN = 8, 1 << 16
_FOREIGN_STARTS = {
    b"\x1f\x8b": "is gzip-compressed; unpack it (`gunzip -c FILE > NEW`)",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed; unpack it (`unzstd -c FILE > NEW`)",
    b"BZh": "is bzip2-compressed; unpack it (`bunzip2 -c FILE > NEW`)",
    b"\xfd7zXZ\0": "is xz-compressed; unpack it (`unxz -c FILE > NEW`)",
    b"PK\x03\x04": "is a zip archive; pack its files as a tar",
    b"PAR1": "is a Parquet file; `bitdance pack` makes shards of it",
    b"version https://git-lfs": "is a pointer of git-lfs; fetch the file itself (`git lfs pull`)",
    b"<": "is a web page or XML, perhaps an error message of a server; fetch the shard again",
}
_KIND, _PREFIX = 156, 345
_CHECKSUM = slice(148, 156)
# The checksum of a header counts its own field as eight spaces (POSIX ustar).
_CHECKSUM_SPACES = 8 * 0x20
_LANES = np.uint64(0x00FF00FF00FF00FF)
_OCTAL_WEIGHTS = 8 ** np.arange(5, -1, -1)


@dataclass(frozen=True)
class Members:
    """Some regular files of a tar, in file order.

    Attributes:
        window: bytes of the tar, with these files and their headers; of a file that is longer, its beginning.
        start: place of the window in the tar.
        names: path of each file in the tar, as bytes.
        offsets: first byte of each content in the tar; the header is the 512 bytes before it.
        num_bytes: length of each content.
    """

    window: bytes
    start: int
    names: list[bytes]
    offsets: list[int]
    num_bytes: list[int]


@dataclass(frozen=True)
class Link:
    """A member that holds no content but names another file.

    Attributes:
        name: path of the link in the tar.
        target: what it names: of a hard link an earlier member, of a symbolic link a path on some file system.
        is_symbolic: which of the two.
    """

    name: bytes
    target: bytes
    is_symbolic: bool


@dataclass(frozen=True)
class TarError:
    """A place where a tar is broken.

    Attributes:
        offset: the place, in bytes from the start of the tar.
        problem: what is wrong there, in words.
    """

    offset: int
    problem: str


class TarScan:
    """The regular files of a tar (ustar, GNU or pax). Iterate once; after that, the attributes are complete.

    Args:
        read: reads a range of the tar.
        total_bytes: length of the tar.
        window_bytes: how much is read at a time.

    Attributes:
        tar_errors: the first `MAX_TAR_ERRORS` places where the tar is broken, in the order of the walk.
        num_tar_errors: how many there are.
        links: its hard and symbolic links.
    """

    def __init__(self, read: ReadRange, total_bytes: int, window_bytes: int = WINDOW_BYTES) -> None:
        self.tar_errors: list[TarError] = []
        self.num_tar_errors = 0
        self.links: list[Link] = []
        self._read = read
        self._total_bytes = total_bytes
        self._window_bytes = window_bytes
        # What GNU and pax headers say about the member that follows.
        self._overrides: dict[str, bytes] = {}
        self._is_nameless = False
        self._longest_run = _LONG_RUN

    def __iter__(self) -> Iterator[Members]:
        window, start = b"", 0
        position: int | None = 0
        while position is not None:
            if not start <= position <= start + len(window) - BLOCK_BYTES:
                window, start = self._read(position, self._window_bytes), position
            members = Members(window, start, [], [], [])
            if not (self._overrides or self._is_nameless):
                position = self._take_run(members, position)
            header = window[position - start : position - start + BLOCK_BYTES]
            if position > start and self._is_cut(window, position - start, header):
                # Read again, by a window that starts there.
                window = b""
            else:
                position = self._take_one(members, position, header)
            if members.names:
                yield members

    def again(self) -> TarScan:
        """The same walk from the beginning."""
        return TarScan(self._read, self._total_bytes, self._window_bytes)

    def _is_cut(self, window: bytes, place: int, header: bytes) -> bool:
        """Whether a window ends within the member at `place`."""
        if len(header) < BLOCK_BYTES:
            return True
        size = self._size(header) if header[_KIND] in _REGULAR_KINDS else None
        return size is not None and place + BLOCK_BYTES + size > len(window)

    def _take_run(self, members: Members, position: int) -> int:
        """Takes the run of plain headers that starts at `position`; returns the place after it."""
        window, start = members.window, members.start
        headers: list[bytes] = []
        places: list[int] = []
        sizes: list[int] = []
        place, last, room = position - start, len(window) - BLOCK_BYTES, self._total_bytes - start
        length = len(window)
        while place <= last and len(headers) < self._longest_run:
            header = window[place : place + BLOCK_BYTES]
            if header[_KIND] not in _REGULAR_KINDS:
                break
            try:
                size = int(header[124:135], 8)
            except ValueError:
                break
            end = place + BLOCK_BYTES + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
            if size < 0 or end > room or (place and place + BLOCK_BYTES + size > length):
                break
            headers.append(header)
            places.append(start + place)
            sizes.append(size)
            place = end
        count = _num_valid(headers)
        # After an invalid header the next one may be near: the headers after it would be walked once for each.
        self._longest_run = _SHORT_RUN if count < len(headers) else min(2 * self._longest_run, _LONG_RUN)
        if count < len(headers):
            place = places[count] - start
            headers, places, sizes = headers[:count], places[:count], sizes[:count]
        if any(header[_PREFIX] for header in headers):
            members.names.extend(map(_name, headers))
        else:
            members.names.extend([header[:100].partition(b"\0")[0] for header in headers])
        members.offsets.extend([place + BLOCK_BYTES for place in places])
        members.num_bytes.extend(sizes)
        return start + place

    def _take_one(self, members: Members, position: int, header: bytes) -> int | None:
        """Takes one header of any kind; returns the place of the next one, None at the end of the tar."""
        if position == 0 and (foreign := _foreign(header)):
            self._record(0, f"no tar: the file {foreign}")
            return None
        if len(header) < BLOCK_BYTES:
            self._record(position, "the tar ends without an end-of-archive mark, so it was cut")
            return None
        if header == _ZERO_BLOCK:
            next_byte = self._first_byte(position)
            if next_byte is None:
                return None
            return self._resume(position, f"an empty header, but there is data at byte {next_byte}")
        if not _is_checksum_right(header):
            return self._resume(position, "the tar header fails its checksum")
        kind, content = header[_KIND], position + BLOCK_BYTES
        size = 0 if kind in _DATALESS_KINDS else self._size(header)
        if size is None:
            return self._resume(position, "the tar header holds no valid size")
        end = content + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        name = self._overrides.get("path") or _name(header)
        if end > self._total_bytes:
            member = f"member {_text(name)!r} of {size} bytes"
            problem = f"{member} reaches past the end of the file ({self._total_bytes} bytes): it was cut"
            return self._resume(position, problem)
        if kind in (_LONG_NAME, _LONG_TARGET, _PAX):
            return self._take_extension(position, kind, size) or end
        if kind in _REGULAR_KINDS and not self._is_nameless:
            members.names.append(name)
            members.offsets.append(content)
            members.num_bytes.append(size)
        elif kind in (_HARD_LINK, _SYMBOLIC_LINK) and not self._is_nameless:
            target = self._overrides.get("linkpath") or header[_LINK_TARGET].partition(b"\0")[0]
            self.links.append(Link(name, target, kind == _SYMBOLIC_LINK))
        elif kind not in _REGULAR_KINDS | _DATALESS_KINDS | {ord("g")}:
            self._record(position, f"tar member type {chr(kind)!r} is not supported")
        if kind != ord("g"):
            self._overrides, self._is_nameless = {}, False
        return end

    def _take_extension(self, position: int, kind: int, size: int) -> int | None:
        """Takes a header that describes the next member; returns where to go on if it is malformed, otherwise None."""
        content = position + BLOCK_BYTES
        if size > (_MAX_PAX_BYTES if kind == _PAX else _MAX_NAME_BYTES):
            what = "pax header" if kind == _PAX else "GNU long name"
            self._record(position, f"a {what} of {size} bytes; the member after it is left out")
            self._is_nameless = True
            return None
        if kind == _PAX:
            records = _pax_records(self._read(content, size))
            if records is None:
                return self._resume(position, "the pax header is malformed")
            self._overrides |= records
        else:
            key = "path" if kind == _LONG_NAME else "linkpath"
            self._overrides[key] = self._read(content, size).partition(b"\0")[0]
        return None

    def _record(self, position: int, problem: str) -> None:
        self.num_tar_errors += 1
        if len(self.tar_errors) < MAX_TAR_ERRORS:
            self.tar_errors.append(TarError(position, problem))

    def _resume(self, position: int, problem: str) -> int | None:
        """Records a tar error; returns the place of the next valid header, None if there is none."""
        self._record(position, problem)
        self._overrides, self._is_nameless = {}, False
        place = position + BLOCK_BYTES
        for window in self._growing_windows(place):
            table = np.frombuffer(window, np.uint8)[: len(window) // BLOCK_BYTES * BLOCK_BYTES].reshape(-1, BLOCK_BYTES)
            for row in np.flatnonzero((table[:, 257:262] == np.frombuffer(_MAGIC, np.uint8)).all(axis=1)).tolist():
                if _is_checksum_right(table[row].tobytes()):
                    return place + row * BLOCK_BYTES
            place += table.size
        return None

    def _first_byte(self, position: int) -> int | None:
        """Place of the first byte that is not zero, from `position` on; None if there is none."""
        for window in self._growing_windows(position):
            rest = window.lstrip(b"\0")
            if rest:
                return position + len(window) - len(rest)
            position += len(window)
        return None

    def _growing_windows(self, position: int) -> Iterator[bytes]:
        """The bytes from `position` on, little of them at first: what is looked for is mostly near.

        Only whole blocks, but for the last. A tar with an error in every other header is still walked in proportion to
        its length.
        """
        most = max(1, self._window_bytes // BLOCK_BYTES) * BLOCK_BYTES
        num_bytes = min(_SMALL_WINDOW_BYTES, most)
        while window := self._read(position, num_bytes):
            yield window
            position += len(window)
            num_bytes = min(2 * num_bytes, most)

    def _size(self, header: bytes) -> int | None:
        try:
            if "size" in self._overrides:
                size = int(self._overrides["size"])
            elif header[124] & 0x80:
                # GNU base-256 for members of 8 GiB and more.
                size = int.from_bytes(header[125:136], "big")
            else:
                size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        except ValueError:
            return None
        return size if size >= 0 else None


def _num_valid(headers: list[bytes]) -> int:
    """How many headers have the right checksum before the first that does not."""
    if len(headers) < _SHORT_RUN:
        # One by one: the arrays below cost as much as ten headers.
        return next((row for row, header in enumerate(headers) if not _is_checksum_right(header)), len(headers))
    joined = b"".join(headers)
    # Sums bytes in four 16-bit lanes at once: the 128 bytes of a lane add up to less than 2^16.
    words = np.frombuffer(joined, np.uint64).reshape(len(headers), -1)
    lanes = (words & _LANES).sum(axis=1) + ((words >> np.uint64(8)) & _LANES).sum(axis=1)
    fields = np.frombuffer(joined, np.uint8).reshape(len(headers), -1)[:, _CHECKSUM].astype(np.int64)
    found = lanes.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64) - fields.sum(axis=1) + _CHECKSUM_SPACES
    digits = fields[:, :6] - ord("0")
    is_valid = ((digits >= 0) & (digits < 8)).all(axis=1) & (digits @ _OCTAL_WEIGHTS == found)
    for row in np.flatnonzero(~is_valid).tolist():
        # The field is written in another way, or the checksum is wrong.
        if not _is_checksum_right(headers[row]):
            return row
    return len(headers)


def _foreign(header: bytes) -> str | None:
    """What a file is, and what to do with it, if it begins as something else than a tar."""
    if len(header) == BLOCK_BYTES and _is_checksum_right(header):
        return None
    return next((name for start, name in _FOREIGN_STARTS.items() if header.startswith(start)), None)


def _is_checksum_right(header: bytes) -> bool:
    field = header[_CHECKSUM]
    try:
        stored = int(field.rstrip(b"\0 ") or b"-1", 8)
    except ValueError:
        return False
    return stored == sum(header) - sum(field) + _CHECKSUM_SPACES


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX ustar has a prefix field; GNU headers ("ustar  ") use these bytes for other things.
    prefix = header[_PREFIX:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")


def _pax_records(content: bytes) -> dict[str, bytes] | None:
    r"""The records of a pax header, "<length> <key>=<value>\n" with the length of the whole record; None if invalid."""
    records: dict[str, bytes] = {}
    place, stop = 0, len(content.rstrip(b"\0"))
    while place < stop:
        space = content.find(b" ", place, place + _MAX_LENGTH_DIGITS + 1)
        digits = content[place:space]
        if space < 0 or not digits.isdigit():
            return None
        end = place + int(digits)
        if end <= space + 1 or end > len(content):
            return None
        key, _, value = content[space + 1 : end].rstrip(b"\n").partition(b"=")
        if len(value) > _MAX_NAME_BYTES and key in (b"path", b"linkpath"):
            return None
        records[key.decode("utf-8", errors="replace")] = value
        place = end
    return records
