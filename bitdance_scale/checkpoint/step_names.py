"""What checkpoints are called, in the folder of a run and in its copies elsewhere, which both use these names."""

from __future__ import annotations

import re

CHECKPOINTS_DIR = "checkpoints"
"""Folder of the checkpoints in that of a run."""
START_DIR = "start"
"""Folder, in that of a run, of what was fetched from S3 to start from."""
LATEST_NAME = "latest"
"""Names the checkpoint that a run goes on from."""
STEP_NAME = re.compile(r"step_(\d{8,})")
"""The name of a committed checkpoint, with its step."""


def step_name(step: int) -> str:
    """The name of a checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint by its name; None for any other name."""
    match = STEP_NAME.fullmatch(name)
    return None if match is None else int(match[1])
