"""`config.toml` of a run folder, and what it was before."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from bitdance_scale.atomic_files import sync, write_text

CONFIG_FILE = "config.toml"


def earlier_config(run_folder: Path, step: int) -> Path:
    """Where the configuration is kept that held until a step."""
    return run_folder / f"config.step_{step:06d}.toml"


def write_config(run_folder: Path, text: str, step: int) -> None:
    """Writes the configuration of a run that goes on from a step; one of other settings is kept beside it.

    Nothing is kept at step 0, as nothing was trained with it; nor where one is kept already, which is the one that was
    trained with.

    Args:
        run_folder: the run's folder.
        text: the resolved configuration as TOML.
        step: optimiser steps taken.

    Raises:
        OSError: of the file system.
    """
    path, kept = run_folder / CONFIG_FILE, earlier_config(run_folder, step)
    if step > 0 and path.is_file() and not kept.exists() and _differs(path, text):
        os.replace(path, kept)
        sync(run_folder)
    write_text(path, text)


def _differs(path: Path, text: str) -> bool:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) != tomllib.loads(text)
    except ValueError:
        return True
