"""What checkpoints are called, and which of them stay: the same in a run's folder and in its copies elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence

LATEST_NAME = "latest"
"""Names the checkpoint that a run goes on from."""
STEP_NAME = re.compile(r"step_(\d{8,})")
"""The name of a committed checkpoint, with its step."""


def step_name(step: int) -> str:
    """The name of a checkpoint."""
    return f"step_{step:08d}"


def kept(steps: Sequence[int], keep: int, every: int = 0) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
        steps: of all checkpoints that count, in any order.
        keep: how many of the newest stay; 0: all.
        every: steps that are a multiple of it stay for ever; 0: none does.
    """
    newest = sorted(steps)[-keep:] if keep else steps
    return {*newest, *(step for step in steps if every and step % every == 0)}
