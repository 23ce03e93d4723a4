"""What can be wrong with a sample, and how often it was: every sample error is counted by cause and shard.

A bad sample must neither stop a run of a month nor vanish without a trace. It is skipped: its place in the plan stays,
but it is left out of its pack and counted. If more than `data.max_skipped_share` of the samples of all replicas are
skipped, the run stops and names the shards.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence

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
        max_skipped_share: largest share of skipped samples among those that all replicas have read. `check` stops the
            run above it, but not before `MIN_SAMPLES_FOR_STOP` samples, because a share of few samples says little.

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

    @property
    def totals(self) -> tuple[int, int]:
        """(samples read, samples skipped)."""
        return self.num_read, self.num_skipped

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

    def check(self, totals: Sequence[int], from_all_ranks: Callable[[ErrorCounter], Sequence[ErrorCounter]]) -> None:
        """Stops the run if too many samples are skipped; all ranks call it alike, and decide alike.

        A replica alone has read too few samples: of many replicas that skip a tenth of what is allowed, one would soon
        have two bad samples among its first thousand.

        Args:
            totals: the sums of all ranks' `totals`.
            from_all_ranks: gives the counters of all ranks, in their order; called if the run stops.

        Raises:
            DataError: on all ranks the same: more samples are skipped than allowed. Names counts, causes and shards of
                all ranks, and the latest sample of one.
        """
        num_read, num_skipped = totals
        if num_read < MIN_SAMPLES_FOR_STOP or num_skipped <= self._max_skipped_share * num_read:
            return
        run = ErrorCounter(self._max_skipped_share)
        for counter in from_all_ranks(self):
            run._add(counter)
        raise DataError(
            f"{run.summary()}. That is more than data.max_skipped_share={self._max_skipped_share:g} allows. Latest: "
            f"{run._example}. Repair or remove these shards, or raise data.max_skipped_share if training without "
            "these samples is acceptable."
        )

    def _add(self, other: ErrorCounter) -> None:
        self.num_read += other.num_read
        self.num_skipped += other.num_skipped
        for cause, shards in other._counts.items():
            self._counts.setdefault(cause, Counter()).update(shards)
        self._example = other._example or self._example
