"""The fault ledger: every sample that could not be used as it should is counted, by cause and shard.

A corrupt sample must neither stop a run of a month nor vanish silently. It becomes a hole: the plan stands, the sample
is left out of its pack, and the ledger counts it; when skipped_samples pass a set share the run stops and names the shards.
"""

from __future__ import annotations

import enum
from collections import Counter

from bitdance_scale.errors import DataError

MIN_SAMPLES_FOR_STOP = 1000
_NUM_SHARDS_NAMED = 3


class ErrorCause(enum.StrEnum):
    """Why a sample was left out (a hole) or trained without its caption (the last three, no skipped_samples)."""

    READ_FAILED = "read_failed"
    SHARD_CHANGED = "shard_changed"
    BAD_IMAGE = "bad_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    SIZE_MISMATCH = "size_mismatch"
    UNSUPPORTED_MODE = "unsupported_mode"
    EMPTY_CAPTION = "empty_caption"
    MISSING_CAPTION = "missing_caption"
    INVALID_CAPTION = "invalid_caption"

    @property
    def is_skipped(self) -> bool:
        """Whether the sample is left out."""
        return self not in (ErrorCause.EMPTY_CAPTION, ErrorCause.MISSING_CAPTION, ErrorCause.INVALID_CAPTION)


class SampleError(Exception):
    """One sample cannot be read or decoded; the loader turns it into a hole.

    Attributes:
        cause: what the ledger counts it under.
        detail: what exactly was found.
    """

    def __init__(self, cause: ErrorCause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


class ErrorCounter:
    """Counts of one loader since it started, kept by the thread that consumes its packs.

    Args:
        max_skipped_share: skipped_samples over samples read above which `check` stops the run, once
            `MIN_SAMPLES_FOR_STOP` samples were read (before that, the share says nothing).
    """

    def __init__(self, max_skipped_share: float) -> None:
        self._max_hole_share = max_skipped_share
        self._counts: dict[ErrorCause, Counter[str]] = {}
        self._example = ""
        self.num_read = 0
        self.num_skipped = 0

    def record_read(self, num_samples: int = 1) -> None:
        """Counts samples that were read or tried."""
        self.num_read += num_samples

    def record_skipped(self, fault: SampleError, shard: str, name: str) -> None:
        """Counts a sample that had to be left out; `name` is its key in the shard."""
        self.num_skipped += 1
        self._counts.setdefault(fault.cause, Counter())[shard] += 1
        self._example = f"{shard}: sample {name}: {fault}"

    def record_caption(self, cause: ErrorCause, shard: str) -> None:
        """Counts a sample that is trained, but without a caption because it has none."""
        self._counts.setdefault(cause, Counter())[shard] += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Faults by cause, then by shard path."""
        return {str(cause): dict(shards) for cause, shards in self._counts.items()}

    def summary(self) -> str:
        """One line: totals, then every cause with the shards it hit most."""
        parts = [f"{self.num_skipped} of {self.num_read} samples could not be used"]
        for cause, shards in self.counts().items():
            worst = sorted(shards.items(), key=lambda item: (-item[1], item[0]))
            named = ", ".join(f"{shard} ({count})" for shard, count in worst[:_NUM_SHARDS_NAMED])
            others = f" and {len(worst) - _NUM_SHARDS_NAMED} more shards" if len(worst) > _NUM_SHARDS_NAMED else ""
            parts.append(f"{cause} {sum(shards.values())} in {named}{others}")
        return "; ".join(parts)

    def check(self) -> None:
        """Stops the run when too much of the data is broken.

        Raises:
            DataError: skipped_samples exceed the share; names counts, causes, shards and the latest case.
        """
        if self.num_read < MIN_SAMPLES_FOR_STOP or self.num_skipped <= self._max_hole_share * self.num_read:
            return
        raise DataError(
            f"{self.summary()}. That is more than data.max_skipped_share={self._max_hole_share:g} allows. Latest: "
            f"{self._example}. Repair or remove these shards, or raise data.max_skipped_share if the loss is acceptable."
        )
