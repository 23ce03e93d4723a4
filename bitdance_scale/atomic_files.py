"""Files and folders that are there whole or not at all, even after a crash of the machine.

Everything is written under a temporary name, forced to storage and renamed: a reader, or a restart, sees the old
content or the new content. Text is UTF-8 in every locale. Inside a folder that is renamed as a whole, files may be
written in place, because the whole folder is forced to storage before it is renamed. `checkpoint/checkpoint_folder.py`
builds its protocol for several ranks from `sync_tree` and a rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

WRITING = ".writing"
"""Suffix of what is being written; it is never read."""
REPLACED = ".replaced"
"""Suffix of a folder while its successor takes its place."""

NO_ROOM_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""What the file system says where somebody must make room, raise a quota or mount it for writing."""
STORAGE_ERRNOS = NO_ROOM_ERRNOS | {errno.EIO, errno.ESTALE}
"""The same, and what it says where a disk or a file server fails."""


def is_storage_fault(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether an error is the file system's, of storage that is full, read-only or failing: it may pass."""
    return isinstance(error, OSError) and error.errno in STORAGE_ERRNOS


@contextlib.contextmanager
def replacing(path: Path, *, is_shared: bool = False, is_durable: bool = True) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends without an error and is removed otherwise.

    Args:
        path: the file; its folder is made if absent.
        is_shared: whether several processes may write this file at once. Each then has its own temporary name, and the
            last one to finish stays.
        is_durable: whether the bytes are forced to storage; not needed for what can be made again, such as a cache.

    Raises:
        OSError: of the file system; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{uuid.uuid4().hex}" if is_shared else ""
    writing = path.with_name(f"{path.name}{mark}{WRITING}")
    try:
        yield writing
        if is_durable:
            sync(writing)
        os.replace(writing, path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    if is_durable:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, *, is_shared: bool = False, is_durable: bool = True) -> None:
    """Replaces a file; the arguments are those of `replacing`."""
    with replacing(path, is_shared=is_shared, is_durable=is_durable) as writing:
        writing.write_bytes(content)


def write_text(path: Path, text: str, *, is_shared: bool = False, is_durable: bool = True) -> None:
    """Replaces a text file, in UTF-8 and with the line ends of `text`; the arguments are those of `replacing`."""
    write_bytes(path, text.encode("utf-8"), is_shared=is_shared, is_durable=is_durable)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error and is removed otherwise.

    An earlier `out` stays until its successor is whole. What an interrupted attempt left is removed.

    Raises:
        OSError: of the file system, or another process has made an `out` meanwhile; `out` is as it was.
    """
    writing, replaced = out.with_name(out.name + WRITING), out.with_name(out.name + REPLACED)
    restore_folder(out)
    for left in (writing, replaced):
        if left.exists():
            shutil.rmtree(left)
    writing.mkdir(parents=True)
    try:
        yield writing
        sync_tree(writing)
        if out.exists():
            os.rename(out, replaced)
        os.rename(writing, out)
        sync(out.parent)
    except BaseException:
        restore_folder(out)
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def commit_folder(writing: Path, out: Path) -> None:
    """Forces a finished folder to storage and renames it to `out`; for folders that are named by their content.

    If another process has made an `out` meanwhile, its content is the same: it stays and `writing` is removed.

    Raises:
        OSError: of the file system.
    """
    sync_tree(writing)
    try:
        os.rename(writing, out)
    except OSError:
        if not out.is_dir():
            raise
        shutil.rmtree(writing)
    sync(out.parent)


def restore_folder(out: Path) -> None:
    """Gives a folder its name back if its replacement was interrupted between the two renames."""
    replaced = out.with_name(out.name + REPLACED)
    if replaced.exists() and not out.exists():
        os.rename(replaced, out)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a file system, or the user's part of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Forces a folder and everything in it to storage."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync(path)
