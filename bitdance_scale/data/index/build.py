"""Builds the index of a data set: in parallel, only from shards that are new or have changed, and resumable.

From time to time, what has been scanned is saved as a part, which is itself an index. A build that was stopped goes on
from its parts. At the end the pieces of all shards, from an earlier index, the parts and memory, are joined column by
column, with never more than one piece in memory.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import orjson

from bitdance_scale.atomic_files import WRITING, commit_folder, write_bytes
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index.index import (
    FORMAT,
    NAME,
    TABLE_NAME,
    Index,
    ShardEntry,
    caption_column,
    column_files,
    columns_folder,
    content_index,
    open_index,
    score_column,
)
from bitdance_scale.data.index.shard_scan import COLUMN_DTYPES, scan_shard
from bitdance_scale.data.index.tar_scan import WINDOW_BYTES
from bitdance_scale.data.storage.store_contract import ReadError, ShardState
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError

logger = logging.getLogger(__name__)

_PARTS_NAME = ".parts"
_PART_SAMPLES = 1 << 20
_PART_S = 60.0
_BYTES_PER_WORKER = 1 << 31
_MAX_WORKERS = 32
_TASKS_PER_WORKER = 4
_REMOTE_WINDOW_BYTES = 16 << 20
_Progress = Callable[[ShardEntry], None]


@dataclass(frozen=True)
class _Piece:
    """The samples of one shard in an index."""

    entry: ShardEntry
    index: Index
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.entry.num_samples

    def values(self, column: str) -> np.ndarray:
        return self.index.columns[column][self.start : self.stop]

    def text(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the texts, and the bytes of all texts one after the other."""
        starts = self.index.columns[f"{column}_start"][self.start : self.stop + 1]
        return np.diff(starts), self.index.columns[f"{column}_text"][starts[0] : starts[-1]]


@dataclass(frozen=True)
class _Task:
    """A shard to scan."""

    path: str
    state: ShardState


_Scan = Callable[[_Task], Index]


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

    Shards that the index in the folder has with the same path, length and tag are not read again.

    Args:
        shards: paths of tars, as `shards.expand_shards` gives them; their order is the order of the samples.
        index_dir: folder of the index, created if missing.
        captions: caption sources to keep (`captions.CaptionSource`), besides those that the index already has.
        num_workers: processes that scan; None: depends on the amount to read, and little is read in this process.
        progress: called for every shard that has been scanned.
        stores: how to read shards; None: with default settings.

    Raises:
        DataError: a shard is missing or cannot be read, no shard holds an image, or the folder cannot be written.
    """
    index_dir = Path(index_dir)
    stores = stores or Stores()
    tasks = [_Task(path, state) for path, state in zip(shards, stores.states(shards), strict=True)]
    try:
        old = _open_old(index_dir)
        if old is not None:
            captions = tuple(dict.fromkeys((*old.captions, *captions)))
            if old.captions == captions and _is_of(old, tasks):
                return old
        parts = _open_parts(index_dir)
        known = _pieces(index for index in (*parts.values(), old) if index is not None)
        known = {task: piece for task, piece in known.items() if set(captions) <= set(piece.index.captions)}
        missing = [task for task in dict.fromkeys(tasks) if task not in known]
        scan = partial(scan_file, captions=captions, stores=stores)
        known |= _scan_all(missing, scan, num_workers, partial(_save_part, index_dir, parts), progress)
        pieces = [known[task] for task in tasks]
        if not sum(piece.entry.num_samples for piece in pieces):
            raise DataError(
                f"data.shards: no usable image in {len(shards)} shards ({_all_errors(pieces)}). A sample needs a .jpg, "
                ".png or .webp member, and .txt and .json members with the same key."
            )
        _write(pieces, captions, index_dir)
        for folder in parts:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{index_dir}: cannot write the index ({error}). Set data.index_dir to a writable folder."
        ) from error
    return open_index(index_dir)


def scan_file(task: _Task, captions: Sequence[str], stores: Stores) -> Index:
    """Scans one shard and returns its index.

    Raises:
        DataError: the shard cannot be opened or read.
    """
    total_bytes = task.state.num_bytes

    def read(offset: int, num_bytes: int) -> bytes:
        return stores.read(task.path, offset, max(0, min(num_bytes, total_bytes - offset)), task.state.tag)

    window_bytes = _REMOTE_WINDOW_BYTES if task.path.startswith(S3_SCHEME) else WINDOW_BYTES
    try:
        with _no_collection():
            content = scan_shard(read, total_bytes, captions, window_bytes)
    except ReadError as error:
        raise DataError(f"{task.path}: cannot read the shard ({error}). Correct data.shards or restore it.") from error
    entry = ShardEntry(task.path, total_bytes, task.state.tag, len(content), content.errors, content.tar_errors)
    return content_index(entry, content)


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


def _is_of(index: Index, tasks: Sequence[_Task]) -> bool:
    return [_task_of(entry) for entry in index.shards] == list(tasks)


def _task_of(entry: ShardEntry) -> _Task:
    return _Task(entry.path, ShardState(entry.num_bytes, entry.tag))


def _pieces(indexes: Iterator[Index]) -> dict[_Task, _Piece]:
    pieces: dict[_Task, _Piece] = {}
    for index in indexes:
        start = 0
        for entry in index.shards:
            pieces[_task_of(entry)] = _Piece(entry, index, start)
            start += entry.num_samples
    return pieces


def _all_errors(pieces: Sequence[_Piece]) -> dict[str, dict[str, int]]:
    return {piece.entry.path: piece.entry.errors for piece in pieces}


def _scan_all(
    tasks: Sequence[_Task],
    scan: _Scan,
    num_workers: int | None,
    save: Callable[[Sequence[_Piece]], dict[_Task, _Piece]],
    progress: _Progress | None,
) -> dict[_Task, _Piece]:
    """Scans shards and saves the results as parts from time to time; the last results stay in memory."""
    if num_workers is None:
        num_workers = min(sum(task.state.num_bytes for task in tasks) // _BYTES_PER_WORKER, _num_cores(), _MAX_WORKERS)
    found: dict[_Task, _Piece] = {}
    unsaved: list[_Piece] = []
    saved_s = time.monotonic()
    try:
        for index in _scanned(tasks, scan, num_workers):
            unsaved.append(_Piece(index.shards[0], index, 0))
            if progress is not None:
                progress(index.shards[0])
            num_samples = sum(piece.entry.num_samples for piece in unsaved)
            if num_samples >= _PART_SAMPLES or (num_samples and time.monotonic() - saved_s >= _PART_S):
                found |= save(unsaved)
                unsaved, saved_s = [], time.monotonic()
    except BaseException:
        # The build was stopped or a shard cannot be read: the next build goes on from here.
        if any(piece.entry.num_samples for piece in unsaved):
            save(unsaved)
        raise
    return found | {_task_of(piece.entry): piece for piece in unsaved}


def _scanned(tasks: Sequence[_Task], scan: _Scan, num_workers: int) -> Iterator[Index]:
    if num_workers < 2 or len(tasks) < 2:
        yield from map(scan, tasks)
        return
    # Forking this process could copy threads and CUDA; the server has neither.
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=get_context("forkserver")) as pool:
        waiting = iter(tasks)
        # Few tasks at a time, because results wait in memory until they are taken.
        running = {pool.submit(scan, task) for task in itertools.islice(waiting, _TASKS_PER_WORKER * num_workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(scan, task) for task in itertools.islice(waiting, len(done))}
                while done:
                    yield done.pop().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _open_old(index_dir: Path) -> Index | None:
    """The index in the folder; None if there is none that this version can read, so that it is built again."""
    if not (index_dir / TABLE_NAME).exists():
        return None
    try:
        return open_index(index_dir)
    except DataError as error:
        logger.warning("%s Building it again.", error)
        return None


def _open_parts(index_dir: Path) -> dict[Path, Index]:
    parts: dict[Path, Index] = {}
    for folder in sorted((index_dir / _PARTS_NAME).glob("*")):
        try:
            parts[folder] = open_index(folder)
        except DataError:
            # The build was stopped while it wrote this part, or another version wrote it.
            shutil.rmtree(folder, ignore_errors=True)
    return parts


def _save_part(index_dir: Path, parts: dict[Path, Index], pieces: Sequence[_Piece]) -> dict[_Task, _Piece]:
    folder = index_dir / _PARTS_NAME / uuid.uuid4().hex
    _write(pieces, pieces[0].index.captions, folder)
    parts[folder] = open_index(folder)
    return _pieces(iter([parts[folder]]))


def _write(pieces: Sequence[_Piece], captions: Sequence[str], index_dir: Path) -> None:
    """Writes the columns first, then the table that names them, each by rename."""
    index_dir.mkdir(parents=True, exist_ok=True)
    scores = list(dict.fromkeys(field for piece in pieces for field in piece.index.scores))
    building = index_dir / f".{uuid.uuid4().hex}{WRITING}"
    building.mkdir()
    try:
        digests = _write_columns(pieces, captions, scores, building)
        content = _digest([f"{name} {digest}" for name, digest in digests.items()])
        folder = index_dir / columns_folder(content)
        # Another job may have built the same index, even meanwhile.
        if not folder.exists():
            commit_folder(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    base = ["shard", *COLUMN_DTYPES]
    table = {
        "format": FORMAT,
        "hash": _digest([*(str(piece.entry.num_bytes) for piece in pieces), *(digests[name] for name in base)]),
        "content": content,
        "captions": list(captions),
        "scores": scores,
        "digests": {
            **{name: _digest([digests[f"{caption_column(name)}_{p}"] for p in ("start", "text")]) for name in captions},
            **{score_column(field): digests[score_column(field)] for field in scores},
        },
        "shards": [
            {**dataclasses.asdict(piece.entry), "path": _stored_path(piece.entry.path, index_dir)} for piece in pieces
        ],
    }
    write_bytes(index_dir / TABLE_NAME, orjson.dumps(table), is_shared=True)


def _stored_path(path: str, index_dir: Path) -> str:
    return path if path.startswith(S3_SCHEME) else os.path.relpath(path, os.path.abspath(index_dir))


def _write_columns(
    pieces: Sequence[_Piece], captions: Sequence[str], scores: Sequence[str], folder: Path
) -> dict[str, str]:
    """Writes all columns; returns column -> hexadecimal digest."""
    counts = [piece.entry.num_samples for piece in pieces]
    files = column_files(captions, scores)
    write = partial(_write_column, folder, files)
    digests = {
        "shard": write("shard", np.int32, sum(counts), (np.full(n, row, np.int32) for row, n in enumerate(counts)))
    }
    for name, dtype in COLUMN_DTYPES.items():
        digests[name] = write(name, dtype, sum(counts), (piece.values(name) for piece in pieces))
    for name in (NAME, *map(caption_column, captions)):
        num_bytes = sum(len(piece.text(name)[1]) for piece in pieces)
        digests[f"{name}_start"] = write(f"{name}_start", np.int64, sum(counts) + 1, _starts(pieces, name))
        # One byte more than needed, because an empty array cannot be mapped.
        chunks = itertools.chain((piece.text(name)[1] for piece in pieces), [np.zeros(1, np.uint8)])
        digests[f"{name}_text"] = write(f"{name}_text", np.uint8, num_bytes + 1, chunks)
    for name in map(caption_column, captions):
        status = f"{name}_status"
        digests[status] = write(status, np.uint8, sum(counts), (piece.values(status) for piece in pieces))
    for field in scores:
        name = score_column(field)
        digests[name] = write(name, np.float32, sum(counts), (_score(piece, field) for piece in pieces))
    return digests


def _starts(pieces: Sequence[_Piece], column: str) -> Iterator[np.ndarray]:
    begin = 0
    yield np.zeros(1, np.int64)
    for piece in pieces:
        lengths, _ = piece.text(column)
        yield begin + np.cumsum(lengths, dtype=np.int64)
        begin += int(lengths.sum())


def _score(piece: _Piece, field: str) -> np.ndarray:
    if field in piece.index.scores:
        return piece.values(score_column(field))
    return np.full(piece.entry.num_samples, np.nan, np.float32)


def _write_column(
    folder: Path, files: dict[str, str], name: str, dtype: type, length: int, chunks: Iterator[np.ndarray]
) -> str:
    digest = hashlib.sha256()
    with open(folder / f"{files[name]}.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            content = np.ascontiguousarray(chunk, dtype).data
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([f"bitdance index {FORMAT}", *texts]).encode()).hexdigest()[:32]
