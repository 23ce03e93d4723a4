"""What an index says about its shards: what is missing from them, which look wrong, and whether training may start."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index, ShardEntry
from bitdance_scale.data.index.shard_errors import LOSSES, ShardError, advised
from bitdance_scale.errors import DataError
from bitdance_scale.wording import file_size

_MAX_NAMED_SHARDS = 3
_FEW = 0.5
"""A shard with fewer samples than this share of the median is suspicious."""
_MANY = 0.01
"""So is a shard with errors in more than this share of its samples."""
_SAMPLES_PER_CHUNK = 1 << 24


def skipped_samples(index: Index) -> dict[str, int]:
    """Shard path -> samples of the shard that are missing from the index; complete shards are left out.

    Samples without an image, without a readable size and the like are counted. What a broken tar lacks cannot be
    counted, so it is estimated: its difference to the median of the tars without errors, and at least one sample per
    tar error.
    """
    sound = [entry.num_samples for entry in index.shards if not entry.tar_errors]
    typical = int(np.median(sound)) if sound else 0
    skipped = {entry.path: _num_skipped(entry, typical) for entry in index.shards}
    return {path: count for path, count in skipped.items() if count}


def check_skipped(index: Index, max_share: float) -> None:
    """Refuses to train on shards of which too many samples are missing from the index.

    Args:
        index: the data set.
        max_share: the share of missing samples that is allowed (`data.max_skipped_share`).

    Raises:
        DataError: names the shards that miss most, where they are broken, and what to do.
    """
    skipped = skipped_samples(index)
    num_skipped = sum(skipped.values())
    num_samples = len(index) + num_skipped
    if num_skipped <= max_share * num_samples:
        return
    entries = {entry.path: entry for entry in index.shards}
    worst = sorted(skipped, key=lambda path: (-skipped[path], path))
    named = "; ".join(f"{path}: {skipped[path]} ({_reason(entries[path])})" for path in worst[:_MAX_NAMED_SHARDS])
    others = f"; and {len(worst) - _MAX_NAMED_SHARDS} more shards" if len(worst) > _MAX_NAMED_SHARDS else ""
    raise DataError(
        f"about {num_skipped} of {num_samples} samples would be skipped: {named}{others}. That is more than "
        f"data.max_skipped_share={max_share:g} allows. Fetch or write these shards again, remove them from "
        "data.shards, or raise data.max_skipped_share if training without these samples is acceptable."
    )


def suspicious_shards(index: Index) -> Iterator[tuple[str, str]]:
    """Path and reason of every shard that somebody should look at."""
    typical = float(np.median([entry.num_samples for entry in index.shards]))
    without_caption = np.array([_num_without_caption(index, row) for row in range(len(index.shards))])
    share_without = float(without_caption.sum()) / max(1, len(index))
    for row, entry in enumerate(index.shards):
        reasons = [f"byte {tar_error.offset}: {tar_error.problem}" for tar_error in entry.tar_errors]
        # Tar errors are named already.
        num_errors = sum(count for error, count in entry.errors.items() if error != ShardError.DAMAGED_TAR)
        if num_errors > _MANY * entry.num_samples:
            reasons.append(_counts(entry))
        if entry.num_samples < _FEW * typical:
            reasons.append(f"{entry.num_samples} samples, the median has {typical:g}")
        if without_caption[row] > (share_without + _FEW * (1 - share_without)) * max(1, entry.num_samples):
            reasons.append(f"{without_caption[row]} of {entry.num_samples} samples without a usable caption")
        if reasons:
            yield entry.path, "; ".join(reasons)


def summary(index: Index) -> list[str]:
    """Counts of samples, captions, scores and errors, one line each."""
    size = file_size(sum(entry.num_bytes for entry in index.shards))
    lines = [f"{len(index)} samples in {len(index.shards)} shards of {size}, index {index.hash}"]
    for source in index.captions:
        counts = np.zeros(len(CaptionStatus), np.int64)
        for part in chunks(len(index)):
            counts += np.bincount(index.status(source, part), minlength=len(CaptionStatus))
        named = ", ".join(f"{status.name.lower()} {counts[status]}" for status in CaptionStatus)
        lines.append(f"captions {source}: {named}")
    lines += [f"score {field}: {_describe(index.score(field))}" for field in index.scores]
    for error, shards in index.errors().items():
        lines.append(f"{advised(error)}: {sum(shards.values())} in {len(shards)} shards, first {next(iter(shards))}")
    skipped = skipped_samples(index)
    if skipped:
        lines.append(f"skipped: about {sum(skipped.values())} samples of {len(skipped)} shards")
    return lines


def chunks(num_samples: int) -> Iterator[slice]:
    """Ranges that make up all samples, so that no column is in memory as a whole."""
    for start in range(0, num_samples, _SAMPLES_PER_CHUNK):
        yield slice(start, min(start + _SAMPLES_PER_CHUNK, num_samples))


def _num_without_caption(index: Index, row: int) -> int:
    samples = index.shard_samples(row)
    part = slice(samples.start, samples.stop)
    statuses = [index.status(source, part) != CaptionStatus.USABLE for source in index.captions]
    return int(np.count_nonzero(np.all(statuses, axis=0)))


def _describe(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    num_missing = np.count_nonzero(np.isnan(values))
    num_infinite = len(values) - len(finite) - num_missing
    low, middle, high = np.quantile(finite, (0, 0.5, 1)) if len(finite) else (np.nan,) * 3
    infinite = f", infinite in {num_infinite}" if num_infinite else ""
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}, missing in {num_missing}{infinite}"


def _num_skipped(entry: ShardEntry, typical: int) -> int:
    num_counted = sum(entry.errors.get(error, 0) for error in LOSSES)
    if not entry.tar_errors:
        return num_counted
    return max(num_counted, entry.errors.get(ShardError.DAMAGED_TAR, 1), typical - entry.num_samples)


def _reason(entry: ShardEntry) -> str:
    if entry.tar_errors:
        others = entry.errors.get(ShardError.DAMAGED_TAR, 1) - 1
        more = f" and {others} more places" if others else ""
        return f"byte {entry.tar_errors[0].offset}: {entry.tar_errors[0].problem}{more}"
    return _counts(entry)


def _counts(entry: ShardEntry) -> str:
    return ", ".join(f"{advised(error)} {count}" for error, count in entry.errors.items())
