"""What an index says about its shards: what they lost, which look wrong, and whether training may start on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index, ShardEntry
from bitdance_scale.data.index.shard_scan import ShardError
from bitdance_scale.errors import DataError

_NUM_NAMED = 3
_FEW = 0.5
"""A shard with fewer samples than this share of the median is suspicious."""
_MANY = 0.01
"""So is one with errors in more than this share of its samples."""
_LOSSES = (ShardError.MISSING_IMAGE, ShardError.UNREADABLE_SIZE)


def skipped_samples(index: Index) -> dict[str, int]:
    """Shard path -> samples that it should have had and the index has not; shards that lost none are left out.

    Samples without image or size are counted. Behind the place where a tar was cut nothing can be counted: a damaged
    tar lost at least as many samples as it lacks to the median of the sound ones, and at least one per damage.
    """
    sound = [entry.num_samples for entry in index.shards if not entry.tar_errors]
    typical = int(np.median(sound)) if sound else 0
    lost = {entry.path: _lost(entry, typical) for entry in index.shards}
    return {path: count for path, count in lost.items() if count}


def check_skipped(index: Index, max_share: float) -> None:
    """Refuses to train on shards that lost more than a share of their samples.

    Raises:
        DataError: names the shards that lost most, where they are broken, and what to do.
    """
    lost = skipped_samples(index)
    num_lost = sum(lost.values())
    if num_lost <= max_share * (len(index) + num_lost):
        return
    entries = {entry.path: entry for entry in index.shards}
    worst = sorted(lost, key=lambda path: (-lost[path], path))
    named = "; ".join(f"{path}: {lost[path]} ({_reason(entries[path])})" for path in worst[:_NUM_NAMED])
    others = f"; and {len(worst) - _NUM_NAMED} more shards" if len(worst) > _NUM_NAMED else ""
    raise DataError(
        f"about {num_lost} of {len(index) + num_lost} samples are lost: {named}{others}. That is more than "
        f"data.max_skipped_share={max_share:g} allows. Fetch or write these shards again, remove them from data.shards, or "
        "raise data.max_skipped_share if the loss is acceptable."
    )


def suspicious_shards(index: Index) -> Iterator[tuple[str, str]]:
    """Path and reason of every shard that somebody should look at."""
    typical = float(np.median([entry.num_samples for entry in index.shards]))
    is_without = np.all([index.status(source) != CaptionStatus.USABLE for source in index.captions], axis=0)
    without_caption = np.bincount(index.shard, weights=is_without, minlength=len(index.shards))
    share_without = float(without_caption.sum()) / max(1, len(index))
    for row, entry in enumerate(index.shards):
        reasons = [f"byte {damage.offset}: {damage.problem}" for damage in entry.tar_errors]
        num_faults = sum(count for fault, count in entry.errors.items() if fault != ShardError.DAMAGED_TAR)
        if num_faults > _MANY * entry.num_samples:
            reasons.append(", ".join(f"{fault} {count}" for fault, count in entry.errors.items()))
        if entry.num_samples < _FEW * typical:
            reasons.append(f"{entry.num_samples} samples, the median has {typical:g}")
        if without_caption[row] > (share_without + _FEW * (1 - share_without)) * max(1, entry.num_samples):
            reasons.append(f"{without_caption[row]:.0f} of {entry.num_samples} samples without a usable caption")
        if reasons:
            yield entry.path, "; ".join(reasons)


def summary(index: Index) -> list[str]:
    """Counts of samples, captions, scores and errors, a line each."""
    num_bytes = sum(entry.num_bytes for entry in index.shards)
    lines = [f"{len(index)} samples in {len(index.shards)} shards of {num_bytes / 1e9:.2f} GB, index {index.hash}"]
    for source in index.captions:
        counts = np.bincount(index.status(source), minlength=len(CaptionStatus))
        named = ", ".join(f"{status.name.lower()} {counts[status]}" for status in CaptionStatus)
        lines.append(f"captions {source}: {named}")
    for field in index.scores:
        lines.append(f"score {field}: {_describe(index.score(field))}")
    for fault, shards in index.errors().items():
        lines.append(f"{fault}: {sum(shards.values())} in {len(shards)} shards, first {next(iter(shards))}")
    lost = skipped_samples(index)
    if lost:
        lines.append(f"lost: about {sum(lost.values())} samples of {len(lost)} shards")
    return lines


def _describe(values: np.ndarray) -> str:
    present = values[~np.isnan(values)]
    missing = len(values) - len(present)
    low, middle, high = np.quantile(present, (0, 0.5, 1)) if len(present) else (np.nan,) * 3
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}, missing in {missing}"


def _lost(entry: ShardEntry, typical: int) -> int:
    counted = sum(entry.errors.get(fault, 0) for fault in _LOSSES)
    if not entry.tar_errors:
        return counted
    return max(counted, len(entry.tar_errors), typical - entry.num_samples)


def _reason(entry: ShardEntry) -> str:
    if entry.tar_errors:
        more = f" and {len(entry.tar_errors) - 1} more places" if len(entry.tar_errors) > 1 else ""
        return f"byte {entry.tar_errors[0].offset}: {entry.tar_errors[0].problem}{more}"
    return ", ".join(f"{fault} {count}" for fault, count in entry.errors.items())
