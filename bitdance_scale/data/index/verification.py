"""Whether the segments of an index still hold what was written.

To read hundreds of gigabytes at every start would take minutes. So a segment is compared with its digests when the file
system says that it has changed: `verified.json` keeps length, inode and times of every segment that was compared. The
time of the last change of an inode cannot be set by a program, so neither a copy nor a file that was overwritten passes
unread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.data.index.column_file import digests_of
from bitdance_scale.data.storage.faults import MISSING, unreadable

SETTING = "data.index_dir"
"""What names the folder of an index; for messages."""
VERIFIED_NAME = "verified.json"
_MAX_THREADS = 8


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as it was written.

    Attributes:
        file: name of the file in the index folder.
        num_samples: its samples.
        num_shards: consecutive shards that they are of.
        num_bytes: length of the file.
        digests: column -> digest (`column_file.digests_of`).
    """

    file: str
    num_samples: int
    num_shards: int
    num_bytes: int
    digests: dict[str, str]

    def __hash__(self) -> int:
        return hash(self.file)


def find_damage(
    index_dir: Path, segments: Sequence[SegmentEntry], *, is_whole: bool = False
) -> dict[SegmentEntry, str]:
    """Segments that are not what was written, each with what is wrong.

    Args:
        index_dir: the index folder.
        segments: its segments.
        is_whole: whether to read all of them, and not only those that the file system shows as changed.

    Raises:
        UnreadableError: one cannot be read now.
    """
    known = {} if is_whole else _read_stamps(index_dir)
    stamps = {entry.file: _stamp(index_dir / entry.file) for entry in segments}
    unknown = [entry for entry in segments if stamps[entry.file] is None or stamps[entry.file] != known.get(entry.file)]
    if not unknown:
        return {}
    # Reading and hashing release the interpreter lock.
    with ThreadPoolExecutor(min(_MAX_THREADS, len(unknown))) as pool:
        found = dict(zip(unknown, pool.map(lambda entry: _damage(index_dir, entry), unknown), strict=True))
    damaged = {entry: damage for entry, damage in found.items() if damage}
    names = {entry.file for entry in damaged}
    write_stamps(index_dir, [entry.file for entry in segments if entry.file not in names], damaged=names)
    return damaged


def write_stamps(index_dir: Path, files: Iterable[str], *, damaged: Collection[str] = ()) -> None:
    """Notes that these segments are what was written. A folder that cannot be written is compared at every start.

    What was noted of others stays, because other lists of shards have theirs in the same folder.

    Args:
        index_dir: the index folder.
        files: names of the segments.
        damaged: segments that are not what was written.
    """
    with contextlib.suppress(OSError):
        sound = set(os.listdir(index_dir)).difference(damaged)
        stamps = {file: stamp for file, stamp in _read_stamps(index_dir).items() if file in sound}
        stamps |= {file: stamp for file in files if (stamp := _stamp(index_dir / file)) is not None}
        write_bytes(index_dir / VERIFIED_NAME, orjson.dumps(stamps), is_shared=True, is_durable=False)


def _damage(index_dir: Path, entry: SegmentEntry) -> str:
    path = index_dir / entry.file
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry.num_bytes:
            return f"{num_bytes} bytes, it was written with {entry.num_bytes}"
        found = digests_of(path)
    except MISSING:
        return "is not there"
    except ValueError as error:
        return f"cannot be read ({error})"
    except OSError as error:
        raise unreadable(path, error, SETTING) from error
    wrong = [column for column, digest in entry.digests.items() if found.get(column) != digest]
    return f"its column {wrong[0]} is not what was written ({len(wrong)} of {len(entry.digests)})" if wrong else ""


def _stamp(path: Path) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_stamps(index_dir: Path) -> dict[str, list[int]]:
    try:
        stamps = orjson.loads((index_dir / VERIFIED_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
