"""What checkpoints are called, in the folder of a run and in its copies elsewhere, which both use these names."""

from __future__ import annotations

import re

LATEST_NAME = "latest"
"""Names the checkpoint that a run goes on from."""
STEP_NAME = re.compile(r"step_(\d{8,})")
"""The name of a committed checkpoint, with its step."""


def step_name(step: int) -> str:
    """The name of a checkpoint."""
    return f"step_{step:08d}"
