"""Which commit a result was made at."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Commit:
    """The commit of this checkout, and whether files differ from it."""

    sha: str
    has_changes: bool

    def __str__(self) -> str:
        return self.sha[:12] + (", with changes" if self.has_changes else "")


def find_commit() -> Commit | None:
    """The commit of this checkout; None: it is none of git's."""
    try:
        head, status = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return Commit(head, bool(status))
