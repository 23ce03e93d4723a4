"""Builds the index of a data set: in parallel, only from shards that are new or have changed, and resumable.

Every shard that is scanned becomes a part, a segment of one shard in a file of its own, so that a build that was
stopped goes on from there. Then the shards are divided into segments. A segment of an earlier index, of this list of
shards or of another, whose shards are still neighbours stays as it is; the others are joined from the parts and from
earlier segments. Workers scan and join; this process only keeps the tables. At no time are more than a few files open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import itertools
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
import xxhash

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.captions import DEFAULT_SOURCE, KEY_SOURCES
from bitdance_scale.data.index.column_file import write_columns
from bitdance_scale.data.index.index import (
    FORMAT,
    Index,
    IndexTable,
    ShardEntry,
    entry_of_table,
    find_table,
    open_index,
    stored_path,
    table_path,
)
from bitdance_scale.data.index.known_shards import (
    KnownShard,
    ShardVersion,
    drop_tables,
    earlier_shards,
    mark_used,
    readable_tables,
    version_of,
)
from bitdance_scale.data.index.segment import SCORE, Piece, Segment, join_pieces
from bitdance_scale.data.index.shard_errors import ShardError, advised
from bitdance_scale.data.index.shard_scan import (
    NAME,
    ShardContent,
    caption_column,
    changed_images,
    scan_shard,
    shard_digests,
)
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, WINDOW_BYTES
from bitdance_scale.data.index.verification import SETTING, SegmentEntry, find_damage, write_stamps
from bitdance_scale.data.index.workers import default_workers, in_processes
from bitdance_scale.data.storage.faults import is_full
from bitdance_scale.data.storage.store_contract import ReadError, ShardState
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

logger = logging.getLogger(__name__)

MIN_SEGMENT_SAMPLES = 1 << 20
MAX_SEGMENTS = 256
"""A segment has at least the one, or so many samples that there are at most about this many segments."""
_PARTS_NAME = ".parts"
_PART_SUFFIX = ".safetensors"
_LOCK_NAME = ".lock"
_REMOTE_WINDOW_BYTES = 16 << 20
# The place of an image counts blocks in 32 bits.
_MAX_SHARD_BYTES = BLOCK_BYTES << 32
_Progress = Callable[[ShardEntry], None]


@dataclass(frozen=True)
class _Join:
    """A segment to write."""

    number: int
    folder: Path
    pieces: tuple[Piece, ...]
    texts: tuple[str, ...]
    digests: tuple[dict[str, str], ...]


_Planned = SegmentEntry | _Join


def build_index(
    shards: Sequence[str],
    index_dir: str | Path,
    *,
    captions: Sequence[str] = (DEFAULT_SOURCE,),
    num_workers: int | None = None,
    progress: _Progress | None = None,
    stores: Stores | None = None,
) -> Index:
    """Brings the index of a list of shards up to date and opens it. Only one process of a job may call this.

    Shards that were indexed in the folder with the same path, length and tag are not read again, whatever list they
    were in. The indexes of other lists stay as they are.

    Args:
        shards: paths of tars, as `shards.expand_shards` gives them; their order is the order of the samples.
        index_dir: folder of the index, created if missing.
        captions: caption sources to keep (`captions.CaptionSource`), besides those that the index of this list already
            has. Parts of the key are not kept, because the index has the key.
        num_workers: processes that scan; None: depends on the amount to read, and little is read in this process.
        progress: called for every shard that has been scanned.
        stores: how to read shards; None: with default settings.

    Raises:
        UnreadableError: what was indexed in the folder cannot be read now; nothing is read again because of it.
        DataError: a shard is missing or cannot be read, no shard holds an image, or the folder cannot be written.
    """
    index_dir = Path(index_dir)
    stores = stores or Stores()
    captions = [source for source in captions if source not in KEY_SOURCES] or [DEFAULT_SOURCE]
    tasks = [ShardVersion(path, state) for path, state in zip(shards, stores.states(shards), strict=True)]
    try:
        # Without waiting for a job that builds the index of another list.
        index = _open_current(find_table(index_dir, shards), tasks, captions)
        if index is not None:
            return index
        with _only_builder(index_dir):
            return _build(tasks, index_dir, captions, num_workers, progress, stores)
    except OSError as error:
        way_out = "Raise the limit (`ulimit -n`)" if is_full(error) else f"Set {SETTING} to a writable folder"
        raise DataError(f"{index_dir}: cannot write the index ({error}). {way_out}.") from error


@contextmanager
def _only_builder(index_dir: Path) -> Iterator[None]:
    """Waits until no other process builds in this folder: it may be the very index. A dying process frees the lock."""
    with contextlib.ExitStack() as stack:
        # A folder that cannot be written, or a file system without locks: nobody else can be waited for.
        with contextlib.suppress(OSError):
            index_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(index_dir / _LOCK_NAME, "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("%s: another process builds an index there; waiting for it", index_dir)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_current(table: IndexTable | None, tasks: Sequence[ShardVersion], captions: Sequence[str]) -> Index | None:
    """The index of a table; None if it lacks anything, or a shard has changed, or a segment is damaged."""
    if table is None or not set(captions) <= set(table.captions):
        return None
    if [version_of(entry) for entry in table.shards] != tasks or find_damage(table.path.parent, table.segments):
        return None
    mark_used(table.path)
    return open_index(table.path, is_verified=True)


def _build(
    tasks: Sequence[ShardVersion],
    index_dir: Path,
    captions: Sequence[str],
    num_workers: int | None,
    progress: _Progress | None,
    stores: Stores,
) -> Index:
    own = find_table(index_dir, [task.path for task in tasks])
    if (current := _open_current(own, tasks, captions)) is not None:
        return current
    if own is not None:
        captions = tuple(dict.fromkeys((*own.captions, *captions)))
    earlier = earlier_shards(index_dir, readable_tables(index_dir), tasks, captions)
    known, tasks_now = dict(earlier.usable), set(tasks)
    missing = [task for task in dict.fromkeys(tasks) if task not in known]
    scan = partial(scan_file, captions=captions, stores=stores, parts=index_dir / _PARTS_NAME)
    replaced = {former.entry.path: former for task, former in earlier.every.items() if task not in tasks_now}
    if num_workers is None:
        num_workers = default_workers(sum(task.state.num_bytes for task in missing))
    for found in in_processes(scan, missing, min(num_workers, len(missing))):
        known[version_of(found.entry)] = found
        if (former := replaced.get(found.entry.path)) is not None:
            _warn_of_change(former, found)
        if progress is not None:
            progress(found.entry)
    found_shards = [known[task] for task in tasks]
    if not sum(found.entry.num_samples for found in found_shards):
        raise _nothing_found([found.entry for found in found_shards])
    table = write_index(found_shards, captions, index_dir, earlier.segments, num_workers)
    _remove_parts(index_dir / _PARTS_NAME, found_shards)
    drop_tables(index_dir, newest=table)
    return open_index(table, is_verified=True)


def scan_file(task: ShardVersion, captions: Sequence[str], stores: Stores, parts: Path) -> KnownShard:
    """Scans one shard into a part, or takes the part that an earlier build has left.

    Raises:
        DataError: the shard cannot be opened or read, or is too long.
    """
    total_bytes = task.state.num_bytes
    if total_bytes > _MAX_SHARD_BYTES:
        raise DataError(
            f"{task.path}: {total_bytes} bytes, a shard has at most {_MAX_SHARD_BYTES}. Divide it into smaller tars."
        )
    key = orjson.dumps([FORMAT, task.path, total_bytes, task.state.tag, list(captions)])
    path = parts / f"{xxhash.xxh3_128_hexdigest(key)}{_PART_SUFFIX}"
    if (left := _open_part(path, task)) is not None:
        return left
    try:
        content = read_shard(task.path, task.state, captions, stores)
    except ReadError as error:
        raise DataError(f"{task.path}: cannot read the shard ({error}). Correct data.shards or restore it.") from error
    entry = ShardEntry(task.path, total_bytes, task.state.tag, len(content), content.errors, content.tar_errors)
    digests = shard_digests(content.segment.columns)
    write_columns(path, content.segment.columns, {"shards": [digests], "entry": dataclasses.asdict(entry)})
    return KnownShard(entry, Piece(path, 0, len(content)), digests)


def read_shard(path: str, state: ShardState, captions: Sequence[str], stores: Stores) -> ShardContent:
    """Scans a shard.

    Args:
        path: the shard.
        state: what it is; another object on S3 is refused.
        captions: caption sources to keep.
        stores: how to read it.

    Raises:
        ReadError: it cannot be read.
    """

    def read(offset: int, num_bytes: int) -> bytes:
        return stores.read(path, offset, max(0, min(num_bytes, state.num_bytes - offset)), state.tag)

    window_bytes = _REMOTE_WINDOW_BYTES if path.startswith(S3_SCHEME) else WINDOW_BYTES
    with _no_collection():
        return scan_shard(read, state.num_bytes, captions, window_bytes)


def _open_part(path: Path, task: ShardVersion) -> KnownShard | None:
    """The part of a shard, if an earlier build has left one."""
    try:
        segment = Segment.of_file(path)
        entry, digests = entry_of_table(segment.metadata["entry"], path.parent), segment.metadata["shards"][0]
        if shard_digests(segment.columns) != digests:
            raise ValueError("its columns are not what was written")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: a part that an earlier build left cannot be used (%r); scanning again", path, error)
        return None
    assert version_of(entry) == task, (entry, task)
    return KnownShard(entry, Piece(path, 0, segment.num_samples), digests)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Turns the garbage collector off: it would visit the millions of small objects of a scan, which form no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _remove_parts(folder: Path, indexed: Sequence[KnownShard]) -> None:
    """Removes the parts that are in segments now, and what builds that were killed have not finished.

    Other parts stay: a build of another list was stopped, and goes on from there.
    """
    done = {shard.piece.path for shard in indexed}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path in done or path.suffix != _PART_SUFFIX:
                path.unlink(missing_ok=True)
        folder.rmdir()


def _warn_of_change(former: KnownShard, now: KnownShard) -> None:
    """Says which bytes of a shard have changed since it was indexed; the run goes on with what is there now."""
    places = [Segment.of_file(s.piece.path).values("place", s.piece.rows) for s in (former, now)]
    changed = changed_images(*places)
    if changed or former.entry.num_samples != now.entry.num_samples:
        where = f", the first in bytes {changed[0][0]}..{changed[0][1]}" if changed else ""
        logger.warning(
            "%s: has changed since it was indexed: %d of its %d images are no longer the same%s; now it has %d",
            now.entry.path,
            len(changed),
            former.entry.num_samples,
            where,
            now.entry.num_samples,
        )


def _nothing_found(entries: Sequence[ShardEntry]) -> DataError:
    reasons = [
        f"{entry.path}: "
        + "; ".join(
            [f"byte {e.offset}: {e.problem}" for e in entry.tar_errors[:1]]
            + [f"{count} {advised(error)}" for error, count in entry.errors.items() if error != ShardError.DAMAGED_TAR]
        )
        for entry in entries
        if entry.errors
    ]
    found = f" ({first_few(reasons)})" if reasons else ""
    return DataError(
        f"data.shards: no usable image in {len(entries)} shards{found}. A sample needs a .jpg, .png or .webp member, "
        "and .txt and .json members with the same key."
    )


def write_index(
    shards: Sequence[KnownShard],
    captions: Sequence[str],
    index_dir: Path,
    reusable: Sequence[SegmentEntry],
    num_workers: int,
) -> Path:
    """Writes the segments that are missing, then the table that names all of them, each by rename.

    Returns:
        The table.
    """
    index_dir.mkdir(parents=True, exist_ok=True)
    texts = (NAME, *map(caption_column, captions))
    planned = _plan_segments(shards, reusable, texts, index_dir)
    joins = [segment for segment in planned if isinstance(segment, _Join)]
    joined = dict(in_processes(_join, joins, min(num_workers, len(joins))))
    segments = [joined[segment.number] if isinstance(segment, _Join) else segment for segment in planned]
    scores = list(dict.fromkeys(n.removeprefix(SCORE) for s in shards for n in s.digests if n.startswith(SCORE)))
    places = [f"{s.entry.num_bytes} {s.entry.num_samples} {s.digests['place']}" for s in shards]
    columns = {name: caption_column(name) for name in captions} | {field: SCORE + field for field in scores}
    table = {
        "format": FORMAT,
        "hash": _digest(places),
        "captions": list(captions),
        "scores": scores,
        "digests": {column: _digest([s.digests.get(column, "") for s in shards]) for column in columns.values()},
        "segments": [dataclasses.asdict(segment) for segment in segments],
        "shards": [{**dataclasses.asdict(s.entry), "path": stored_path(s.entry.path, index_dir)} for s in shards],
    }
    write_stamps(index_dir, [segment.file for segment in segments])
    path = table_path(index_dir, [shard.entry.path for shard in shards])
    write_bytes(path, orjson.dumps(table), is_shared=True)
    return path


def _plan_segments(
    shards: Sequence[KnownShard], reusable: Sequence[SegmentEntry], texts: tuple[str, ...], index_dir: Path
) -> list[_Planned]:
    """Divides the shards into segments; those whose shards have stayed together are not written again."""
    num_samples = sum(shard.entry.num_samples for shard in shards)
    target = max(MIN_SEGMENT_SAMPLES, -(-num_samples // MAX_SEGMENTS))
    # A small one is joined with its neighbours, so that their number stays small however often shards are added.
    starts = {index_dir / entry.file: entry for entry in reusable if 2 * entry.num_samples >= target}
    planned: list[_Planned] = []
    group: list[KnownShard] = []

    def close() -> None:
        if group:
            pieces, digests = tuple(s.piece for s in group), tuple(s.digests for s in group)
            planned.append(_Join(len(planned), index_dir, pieces, texts, digests))
            group.clear()

    row, size = 0, 0
    while row < len(shards):
        entry = starts.get(shards[row].piece.path)
        if entry is not None and _is_whole(shards[row : row + entry.num_shards], entry):
            close()
            planned.append(entry)
            row, size = row + entry.num_shards, 0
            continue
        group.append(shards[row])
        size += shards[row].entry.num_samples
        row += 1
        if size >= target:
            close()
            size = 0
    close()
    return planned


def _is_whole(shards: Sequence[KnownShard], segment: SegmentEntry) -> bool:
    """Whether these shards are those of a segment, in its order."""
    if len(shards) < segment.num_shards or shards[0].piece.start:
        return False
    same_file = all(shard.piece.path == shards[0].piece.path for shard in shards)
    in_order = all(a.piece.stop == b.piece.start for a, b in itertools.pairwise(shards))
    return same_file and in_order and shards[-1].piece.stop == segment.num_samples


def _join(join: _Join) -> tuple[int, SegmentEntry]:
    """Writes a segment; returns its number and its entry."""
    # Beside the parts: what a build that was killed leaves there, the next one removes.
    joined = join.folder / _PARTS_NAME / f"{uuid.uuid4().hex}.joined"
    digests = join_pieces(joined, join.pieces, join.texts, {"shards": list(join.digests)})
    num_samples = sum(piece.stop - piece.start for piece in join.pieces)
    file = f"segment_{xxhash.xxh3_64_hexdigest(orjson.dumps(digests))}.safetensors"
    entry = SegmentEntry(file, num_samples, len(join.pieces), joined.stat().st_size, digests)
    # An equal one may be there; the runs that have it open keep theirs.
    os.replace(joined, join.folder / file)
    return join.number, entry


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([f"bitdance index {FORMAT}", *texts]).encode()).hexdigest()[:32]
