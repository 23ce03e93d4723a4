"""What it means that a file cannot be read: it is not there, or it cannot be read now.

Neither a server that fails for a minute nor a file of another user is damage. If they counted as such, a data set would
be read again, or somebody told to delete what is whole. So damaged is only what was read and is wrong.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TypeGuard

from bitdance_scale.errors import UnreadableError

MISSING = (FileNotFoundError, NotADirectoryError)
"""What the file system says of a file that is not there."""


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that no more files can be open. It says nothing about the file."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def unreadable(path: str | Path, error: OSError, setting: str) -> UnreadableError:
    """The error of a file that cannot be read now, with what to do about it.

    Args:
        path: the file, or the folder that it is in; the error may name the very file.
        error: what the file system says; none of `MISSING`.
        setting: the one that names the folder.
    """
    if is_full(error):
        way_out = "Raise the limit (`ulimit -n`) and start again"
    elif isinstance(error, PermissionError):
        way_out = f"Let its owner make it readable for you, or name another folder ({setting})"
    else:
        way_out = "Start again when the storage answers; if it has lost the file for good, delete the file"
    return UnreadableError(
        f"{error.filename or path}: cannot be read now ({error.strerror or error}); it stays as it is. {way_out}."
    )
