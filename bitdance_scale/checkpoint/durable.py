"""File operations that survive a crash of the machine, not only of the process."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file and forces it to storage."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a restart after a crash, sees the old text or the new one."""
    aside = path.with_name(path.name + ".writing")
    write_text(aside, text)
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
