"""Files and folders that are there whole or not at all, also after a crash of the machine.

Everything is written under a name aside, forced to storage, and renamed: a reader, or a restart, sees the old content
or the new one. Text is UTF-8 whatever the locale. This is the only module that does so;
`checkpoint/checkpoint_folder.py` builds its protocol of several ranks out of `sync_tree` and a rename.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

WRITING = ".writing"
"""Ends the name of what is being written; it is never read."""
REPLACED = ".replaced"
"""Ends the name of a folder while its successor takes its place."""


@contextlib.contextmanager
def replacing(path: Path, *, is_shared: bool = False, is_durable: bool = True) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends without an error, and is removed otherwise.

    Args:
        path: the file; its folder is made where it is absent.
        is_shared: whether several processes may write this file at once. Each then has a name of its own aside, and the
            last one stays.
        is_durable: whether the bytes are forced to storage. What can be made again, such as a cache, need not be.

    Raises:
        OSError: of the file system; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{uuid.uuid4().hex}" if is_shared else ""
    aside = path.with_name(f"{path.name}{mark}{WRITING}")
    try:
        yield aside
        if is_durable:
            sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if is_durable:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, *, is_shared: bool = False, is_durable: bool = True) -> None:
    """Replaces a file; the arguments are those of `replacing`."""
    with replacing(path, is_shared=is_shared, is_durable=is_durable) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str, *, is_shared: bool = False, is_durable: bool = True) -> None:
    """Replaces a file of text, in UTF-8 and with the line ends of `text`."""
    write_bytes(path, text.encode("utf-8"), is_shared=is_shared, is_durable=is_durable)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error, and is removed otherwise.

    An `out` that is there already stays until its successor is whole. What an interrupted attempt left is removed.

    Raises:
        OSError: of the file system; `out` is as it was.
    """
    aside, replaced = out.with_name(out.name + WRITING), out.with_name(out.name + REPLACED)
    restore_folder(out)
    for left in (aside, replaced):
        if left.exists():
            shutil.rmtree(left)
    aside.mkdir(parents=True)
    try:
        yield aside
        if out.exists():
            sync_tree(aside)
            os.rename(out, replaced)
        commit_folder(aside, out)
    except BaseException:
        restore_folder(out)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def commit_folder(aside: Path, out: Path) -> None:
    """Forces a finished folder to storage and renames it to `out`.

    Where another process has made an `out` meanwhile, that one stays and `aside` is removed: for folders that are named
    by their content.
    """
    sync_tree(aside)
    try:
        os.rename(aside, out)
    except OSError:
        if not out.is_dir():
            raise
        shutil.rmtree(aside)
    sync(out.parent)


def restore_folder(out: Path) -> None:
    """Puts a folder back whose replacement was interrupted after it had been moved out of the way."""
    replaced = out.with_name(out.name + REPLACED)
    if replaced.exists() and not out.exists():
        os.rename(replaced, out)


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
