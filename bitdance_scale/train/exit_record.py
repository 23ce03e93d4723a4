"""Tells a launcher the exit code of a run, which torchrun would turn into 1."""

from __future__ import annotations

import os
from pathlib import Path

from bitdance_scale.atomic_files import write_text

# Environment variable with the file to write; the launcher names a new one for every start.
EXIT_RECORD = "BITDANCE_EXIT_RECORD"


def record_exit(code: int) -> None:
    """Writes `code` into the launcher's file, on the first rank and if the launcher wants it.

    A run that ends in any other way than by returning a code leaves no file: that is how a fault is told.
    """
    path = os.environ.get(EXIT_RECORD)
    if path and os.environ.get("RANK", "0") == "0":
        write_text(Path(path), f"{code}\n")
