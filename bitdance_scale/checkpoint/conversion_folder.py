"""The folder that a conversion makes: there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import new_folder, restore_folder, write_text
from bitdance_scale.errors import CheckpointError

REPORT_NAME = "conversion_report.json"
Progress = Callable[[int], None]
"""Told how many bytes were done."""


def check_outcome(out: Path, *, is_forced: bool, num_bytes: int) -> None:
    """Sees that a folder can be made, before anything is written.

    Args:
        out: the folder to be made.
        is_forced: whether an earlier conversion there may be replaced.
        num_bytes: what will be written, more or less.

    Raises:
        CheckpointError: it is there already, its parent is not, or the disk has no room for it.
    """
    restore_folder(out)
    if out.exists() or out.is_symlink():
        if not is_forced:
            raise CheckpointError(f"{out}: is there already; name another folder, or pass --force to replace it")
        if not (out / REPORT_NAME).is_file():
            raise CheckpointError(
                f"{out}: has no {REPORT_NAME}, so that --force does not replace it; remove it yourself"
            )
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.parent}; make it, or name another one")
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"{out}: {num_bytes / 1e9:.1f} GB will be written and {free_bytes / 1e9:.1f} GB are free; make room, or "
            "name a folder on another disk"
        )


@contextlib.contextmanager
def conversion_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error.

    Until then it is called `out` and `.writing`; what an interrupted conversion left under that name is removed. An
    earlier `out` stays until its successor is whole.

    Raises:
        CheckpointError: the file system refused something; names what.
    """
    try:
        with new_folder(out) as aside:
            yield aside
    except OSError as error:
        raise CheckpointError(f"{out}: not written ({error}); nothing is left of the attempt") from error


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the report of a conversion into the folder that it made."""
    write_text(folder / REPORT_NAME, json.dumps(content, indent=1) + "\n")
