"""What the tables in an index folder know of shards, whichever lists they are of, so that nothing is read twice.

A run, its held-out shards and a trial on some of the tars may have one folder. Each list has a table of its own there,
and takes from the others what they know.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.data.index.index import IndexTable, ShardEntry, read_table, table_paths
from bitdance_scale.data.index.segment import Piece, Segment
from bitdance_scale.data.index.verification import SETTING, SegmentEntry, find_damage
from bitdance_scale.data.storage.faults import unreadable
from bitdance_scale.data.storage.store_contract import ShardState
from bitdance_scale.errors import DataError, UnreadableError

logger = logging.getLogger(__name__)

MAX_TABLES = 16
"""So many tables stay in a folder, and those that were used within the last hour."""
_MIN_IDLE_S = 3600.0


@dataclass(frozen=True)
class ShardVersion:
    """A shard as it is; with another length or tag it is another version."""

    path: str
    state: ShardState


@dataclass(frozen=True)
class KnownShard:
    """A shard that has been scanned, and where its samples are."""

    entry: ShardEntry
    piece: Piece
    digests: dict[str, str]


@dataclass(frozen=True)
class EarlierShards:
    """What is known of a list of shards.

    Attributes:
        every: all versions of these shards that were indexed.
        usable: those whose captions are kept as wanted.
        segments: the segments that they lie in.
    """

    every: dict[ShardVersion, KnownShard]
    usable: dict[ShardVersion, KnownShard]
    segments: list[SegmentEntry]


@dataclass(frozen=True)
class _Part:
    """A segment as a table names it, with its shards."""

    table: IndexTable
    segment: SegmentEntry
    shards: tuple[ShardEntry, ...]


def version_of(entry: ShardEntry) -> ShardVersion:
    """The version of a shard that was indexed."""
    return ShardVersion(entry.path, ShardState(entry.num_bytes, entry.tag))


def readable_tables(index_dir: Path) -> list[IndexTable]:
    """All tables of an index folder that this version can read.

    Raises:
        UnreadableError: one cannot be read now.
    """
    tables = []
    for path in table_paths(index_dir):
        try:
            tables.append(read_table(path))
        except UnreadableError:
            raise
        except DataError as error:
            logger.warning("%s Shards that no other table knows are read again.", error)
    return tables


def closest_table(index_dir: Path, shards: Collection[str]) -> IndexTable | None:
    """The table that has most of a list of shards, some of which may be gone or new by now; None where none has any.

    Raises:
        UnreadableError: a table cannot be read now.
    """
    wanted = set(shards)
    known = {table.path: sum(entry.path in wanted for entry in table.shards) for table in readable_tables(index_dir)}
    best = max(known, key=lambda path: known[path], default=None)
    return read_table(best) if best is not None and known[best] else None


def earlier_shards(
    index_dir: Path, tables: Sequence[IndexTable], wanted: Collection[ShardVersion], captions: Collection[str]
) -> EarlierShards:
    """What the sound segments of some tables know of shards. Only segments that hold one of them are looked at.

    Args:
        index_dir: the index folder.
        tables: its tables.
        wanted: the shards as they are now.
        captions: caption sources to keep.

    Raises:
        UnreadableError: a segment cannot be read now.
    """
    versions, paths = set(wanted), {version.path for version in wanted}
    # The last one counts. It has most of the shards side by side, so that its segments can stay as they are.
    ordered = sorted(tables, key=lambda table: sum(version_of(entry) in versions for entry in table.shards))
    parts = [part for table in ordered for part in _parts(table) if any(entry.path in paths for entry in part.shards)]
    segments = {part.segment.file: part.segment for part in parts}
    damaged = {entry.file: damage for entry, damage in find_damage(index_dir, list(segments.values())).items()}
    for file, damage in damaged.items():
        logger.warning("%s: %s; reading its %d shards again", index_dir / file, damage, segments[file].num_shards)
    every: dict[ShardVersion, KnownShard] = {}
    usable: dict[ShardVersion, KnownShard] = {}
    for part in parts:
        if part.segment.file in damaged:
            continue
        known = {version_of(shard.entry): shard for shard in _known(index_dir, part)}
        every |= known
        if set(captions) <= set(part.table.captions):
            usable |= known
    return EarlierShards(every, usable, [entry for file, entry in segments.items() if file not in damaged])


def drop_tables(index_dir: Path, newest: Path) -> None:
    """Removes tables above `MAX_TABLES`, first those whose shards cost least to read again: other tables know them.

    Their segments stay, as runs may have them open. What cannot be read or removed stays, too.

    Args:
        index_dir: the index folder.
        newest: the table that was just written, which stays.
    """
    with contextlib.suppress(OSError, UnreadableError):
        if len(table_paths(index_dir)) <= MAX_TABLES:
            return
        tables = readable_tables(index_dir)
        # Another job may have built its table a moment ago, and its ranks are about to open it.
        latest_s = time.time() - _MIN_IDLE_S
        idle = [table for table in tables if table.path != newest and table.path.stat().st_mtime < latest_s]
        for _ in range(min(len(idle), len(tables) - MAX_TABLES)):
            cheapest = min(idle, key=lambda table: (_lost_bytes(table, tables), len(table.shards)))
            cheapest.path.unlink(missing_ok=True)
            idle, tables = ([t for t in some if t is not cheapest] for some in (idle, tables))


def mark_used(table: Path) -> None:
    """Notes that a table is in use; in a folder that cannot be written none is dropped anyway."""
    with contextlib.suppress(OSError):
        os.utime(table)


def _parts(table: IndexTable) -> Iterator[_Part]:
    shards = iter(table.shards)
    for segment in table.segments:
        yield _Part(table, segment, tuple(itertools.islice(shards, segment.num_shards)))


def _known(index_dir: Path, part: _Part) -> Iterator[KnownShard]:
    path, start = index_dir / part.segment.file, 0
    try:
        digests = Segment.of_file(path).metadata["shards"]
    except OSError as error:
        raise unreadable(path, error, SETTING) from error
    for entry, own in zip(part.shards, digests, strict=True):
        yield KnownShard(entry, Piece(path, start, start + entry.num_samples), own)
        start += entry.num_samples


def _lost_bytes(table: IndexTable, tables: Sequence[IndexTable]) -> int:
    """Bytes of the shards of which no other table keeps as much."""
    known = {
        entry.path
        for other in tables
        if other is not table and set(table.captions) <= set(other.captions)
        for entry in other.shards
    }
    return sum(entry.num_bytes for entry in table.shards if entry.path not in known)
