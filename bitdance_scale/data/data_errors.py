"""What can be wrong with a sample, and how often it was: every sample error is counted by cause and shard.

A bad sample must neither stop a run of a month nor vanish without a trace. It is skipped: its place in the plan stays,
but it is left out of its pack and counted. If more than `data.max_skipped_share` of the samples are skipped, the run
stops and names the shards.
"""

from __future__ import annotations

import enum
from collections import Counter

from bitdance_scale.errors import DataError

MIN_SAMPLES_FOR_STOP = 1000
_MAX_NAMED_SHARDS = 3


class ErrorCause(enum.StrEnum):
    """Why a sample was skipped, or trained without a caption (the three with `caption`).

    Bit shards store the place of a cause, so a new one comes at the end.
    """

    READ_FAILED = "read_failed"
    SHARD_CHANGED = "shard_changed"
    BAD_IMAGE = "bad_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    SIZE_MISMATCH = "size_mismatch"
    UNSUPPORTED_MODE = "unsupported_mode"
    EMPTY_CAPTION = "empty_caption"
    MISSING_CAPTION = "missing_caption"
    INVALID_CAPTION = "invalid_caption"
    TOO_EXPENSIVE = "too_expensive"

    @property
    def is_skipped(self) -> bool:
        """Whether the sample is skipped."""
        return self not in (ErrorCause.EMPTY_CAPTION, ErrorCause.MISSING_CAPTION, ErrorCause.INVALID_CAPTION)


class SampleError(Exception):
    """One sample cannot be read or decoded, so it is skipped.

    Attributes:
        cause: the cause under which it is counted.
        detail: what exactly was found.
    """

    def __init__(self, cause: ErrorCause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


class ErrorCounter:
    """Counts the sample errors of one loader since it started; only the thread that takes its packs may use it.

    Args:
        max_skipped_share: largest share of skipped samples among the samples read. `check` stops the run above it, but
            not before `MIN_SAMPLES_FOR_STOP` samples, because a share of few samples says little.

    Attributes:
        num_read: samples that were read, or that should have been.
        num_skipped: samples that were skipped.
    """

    def __init__(self, max_skipped_share: float) -> None:
        self._max_skipped_share = max_skipped_share
        self._counts: dict[ErrorCause, Counter[str]] = {}
        self._example = ""
        self.num_read = 0
        self.num_skipped = 0

    def record_read(self, num_samples: int = 1) -> None:
        """Counts samples that were read, or that should have been."""
        self.num_read += num_samples

    def record_skipped(self, error: SampleError, shard: str, name: str) -> None:
        """Counts a sample that was skipped; `name` is its key in the shard."""
        self.num_skipped += 1
        self._counts.setdefault(error.cause, Counter())[shard] += 1
        self._example = f"{shard}: sample {name}: {error}"

    def record_caption(self, cause: ErrorCause, shard: str) -> None:
        """Counts a sample that is trained without a caption because it has none."""
        self._counts.setdefault(cause, Counter())[shard] += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Cause -> shard path -> number of samples."""
        return {str(cause): dict(shards) for cause, shards in self._counts.items()}

    def summary(self) -> str:
        """One line: totals, then every cause with the shards where it occurred most."""
        parts = [f"{self.num_skipped} of {self.num_read} samples were skipped"]
        for cause, shards in self.counts().items():
            worst = sorted(shards.items(), key=lambda item: (-item[1], item[0]))
            named = ", ".join(f"{shard} ({count})" for shard, count in worst[:_MAX_NAMED_SHARDS])
            others = f" and {len(worst) - _MAX_NAMED_SHARDS} more shards" if len(worst) > _MAX_NAMED_SHARDS else ""
            parts.append(f"{cause} {sum(shards.values())} in {named}{others}")
        return "; ".join(parts)

    def check(self) -> None:
        """Stops the run if too many samples are skipped.

        Raises:
            DataError: more samples are skipped than allowed; names counts, causes, shards and the latest sample.
        """
        if self.num_read < MIN_SAMPLES_FOR_STOP or self.num_skipped <= self._max_skipped_share * self.num_read:
            return
        raise DataError(
            f"{self.summary()}. That is more than data.max_skipped_share={self._max_skipped_share:g} allows. Latest: "
            f"{self._example}. Repair or remove these shards, or raise data.max_skipped_share if training without "
            "these samples is acceptable."
        )
