"""Which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Iterable


def kept_steps(steps: Iterable[int], keep: int, keep_every_steps: int = 0) -> set[int]:
    """The steps whose checkpoints stay: the newest ones, and those that are kept for ever.

    Args:
        steps: of the checkpoints that there are.
        keep: how many of the newest stay.
        keep_every_steps: the checkpoint of every multiple of this stays for ever; 0: none does.
    """
    found = sorted(steps)
    newest = found[-keep:] if keep > 0 else []
    return {*newest, *(step for step in found if keep_every_steps > 0 and step % keep_every_steps == 0)}
