"""The folder that a conversion makes, in either direction: there whole or not at all, with a report."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import new_folder, restore_folder, write_text
from bitdance_scale.errors import CheckpointError
from bitdance_scale.wording import file_size

REPORT_NAME = "conversion_report.json"

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were written or read back since the last call."""


def check_destination(out: Path, *, is_forced: bool, num_bytes: int) -> None:
    """Checks that a folder can be made, before anything is written.

    Args:
        out: the folder to be made.
        is_forced: whether an earlier conversion there may be replaced.
        num_bytes: about how much will be written.

    Raises:
        CheckpointError: the folder exists, its parent does not, or the disk has no room for it.
    """
    restore_folder(out)
    if out.exists() or out.is_symlink():
        if not is_forced:
            raise CheckpointError(f"{out}: exists already; name another folder, or pass --force to replace it")
        if not (out / REPORT_NAME).is_file():
            raise CheckpointError(
                f"{out}: has no {REPORT_NAME}, so --force does not replace it; remove the folder yourself"
            )
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.parent}; make it, or name another folder")
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"{out}: {file_size(num_bytes)} will be written and {file_size(free_bytes)} are free; make room, or name a "
            "folder on another disk"
        )


@contextlib.contextmanager
def conversion_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error.

    Until then its name ends with `.writing`; what an interrupted conversion left under that name is removed. An earlier
    `out` stays until its successor is whole. The folder is forced to storage as a whole before it is renamed, so the
    files in it are written in place.

    Raises:
        CheckpointError: the file system refused something; names what.
    """
    try:
        with new_folder(out) as writing:
            yield writing
    except OSError as error:
        raise CheckpointError(f"{out}: not written ({error}); nothing is left of the attempt") from error


def write_conversion_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the report of a conversion into the folder that it made."""
    write_text(folder / REPORT_NAME, json.dumps(content, indent=1) + "\n")


def misread(what: str) -> CheckpointError:
    """The error of a conversion whose file, or a tensor in it, does not read back as it was written."""
    return CheckpointError(
        f"{what} reads back with other values than were written; the disk or the memory of this machine is faulty: "
        "convert on another machine"
    )
