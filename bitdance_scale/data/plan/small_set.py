"""What a user should hear of a small data set before it is trained on.

Nothing of it stops a run: images that fill no bucket are passed over, those without a caption are trained without one,
and a stream begins again when it has gone through its images.
"""

from __future__ import annotations

import numpy as np

from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.images.limits import MAX_IMAGE_PIXELS
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.buckets import Staircase, content_px, resolution_buckets

MAX_IMAGES = 1 << 20
"""Of larger data sets nothing is said: the counts of their index and of their sources are enough."""
_NUM_NAMED = 5
_NUM_STEPS = 100


def remarks(index: Index, data: DataSection) -> list[str]:
    """A line each on images that fill no bucket, on images without a caption, and on fewer images than a step takes.

    Filters are not looked at. Names are those of the index: the keys of the samples.

    Args:
        index: the data set, divided into `data.active_sources`.
        data: the data section of the configuration.
    """
    if len(index) > MAX_IMAGES:
        return []
    sizes = np.concatenate(
        [
            content_px(index, slice(samples.start, samples.stop), source.has_borders)
            for samples, source in zip(index.sources, data.active_sources, strict=True)
        ]
    ).astype(np.int64)
    buckets = np.concatenate([resolution_buckets(resolution) for resolution in data.resolutions if resolution.share])
    has_bucket = Staircase(buckets, data.max_upscale).covers(*sizes.T.astype(np.uint16, order="C"))
    too_small = np.flatnonzero(~has_bucket & (sizes.prod(axis=1) <= MAX_IMAGE_PIXELS))
    num_left = int(has_bucket.sum())
    found = []
    if len(too_small):
        height, width = buckets[buckets.prod(axis=1).argmin()].tolist()
        found.append(
            f"{len(too_small)} of {len(index)} images are smaller than any bucket and are not trained: "
            f"{_named(index, too_small, sizes)}. The smallest bucket has (height, width) {height} x {width} px with "
            f"data.max_upscale={data.max_upscale:g}; {num_left} images are left. Replace them by larger ones, raise "
            "data.max_upscale, or add a resolution with smaller buckets."
        )
    statuses = [index.status(choice.source, slice(0, len(index))) for choice in data.captions]
    has_caption = np.any([status == CaptionStatus.USABLE for status in statuses], axis=0)
    without = np.flatnonzero(has_bucket & ~has_caption)
    if len(without):
        found.append(
            f"{len(without)} of {num_left} images have no usable caption and are trained without words, as "
            f"data.text_drop does by chance: {_named(index, without)}. Give them captions and pack them again, or "
            "leave them out with bitdance pack --missing-caption skip."
        )
    if 0 < num_left < data.global_batch:
        times = _NUM_STEPS * data.global_batch / num_left
        found.append(
            f"{num_left} images are fewer than a step takes (data.global_batch={data.global_batch}): each is seen "
            f"about {times:.3g} times in {_NUM_STEPS} steps. A run of many steps learns them by heart; watch the "
            "held-out losses, and stop where they rise."
        )
    return found


def _named(index: Index, samples: np.ndarray, sizes: np.ndarray | None = None) -> str:
    """The first names, with (height, width) if `sizes` [N, 2] are given, and how many more there are."""
    names = [
        index.name(sample) + ("" if sizes is None else f" ({sizes[sample, 0]} x {sizes[sample, 1]})")
        for sample in samples[:_NUM_NAMED].tolist()
    ]
    more = len(samples) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
