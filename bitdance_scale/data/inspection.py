"""What is in shards, for a user to look at: counts by resolution, and a grid of samples with captions and buckets.

A sample is drawn as it is stored. Its title says its stored size, the bucket that it is trained at in each resolution,
and its caption.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from bitdance_scale.config.data_schema import DataSection, Resolution
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import summary
from bitdance_scale.data.plan.buckets import assign_buckets, resolution_buckets
from bitdance_scale.data.plan.permutation import Permutation
from bitdance_scale.data.reader import ShardReader

RELEASE_RESOLUTIONS = (
    Resolution(side_px=256, share=2, buckets_px=((256, 256),)),
    Resolution(side_px=512, share=7, buckets_px=((256, 1024), (256, 896), (384, 640), (512, 512))),
    Resolution(
        side_px=1024,
        share=1,
        buckets_px=((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024)),
    ),
)
"""Resolutions with the sizes that the published release samples at."""
_NUM_COLUMNS = 6
_CAPTION_COLUMNS = 34
_CAPTION_LINES = 3


def report(index: Index, resolutions: Sequence[Resolution], max_upscale: float) -> str:
    """Counts of an index: samples, captions, errors of the scan, and the samples of every resolution by bucket."""
    return "\n".join(summary(index) + _resolution_lines(index, range(len(index)), resolutions, max_upscale))


def source_report(index: Index, data: DataSection) -> str:
    """Share of every source of a run, and its samples in every resolution by bucket.

    Args:
        index: divided into the sources.
        data: the run's data.
    """
    lines = []
    for source, samples in zip(data.active_sources, index.sources, strict=True):
        lines.append(f"source {source.name}: share {source.share}, {len(samples)} samples")
        lines += [f"  {line}" for line in _resolution_lines(index, samples, data.resolutions, data.max_upscale)]
    return "\n".join(lines)


def _resolution_lines(index: Index, samples: range, resolutions: Sequence[Resolution], max_upscale: float) -> list[str]:
    heights, widths = index.sizes_px(slice(samples.start, samples.stop)).T
    lines = []
    for resolution in resolutions:
        buckets = resolution_buckets(resolution)
        rows = assign_buckets(heights, widths, buckets, max_upscale)
        counts = np.bincount(rows[rows >= 0], minlength=len(buckets))
        shares = ", ".join(f"{h}x{w} {count}" for (h, w), count in zip(buckets.tolist(), counts, strict=True) if count)
        lines.append(f"resolution {resolution.side_px} px: {counts.sum()} samples (height x width: {shares or 'none'})")
    return lines


def draw_grid(index: Index, resolutions: Sequence[Resolution], max_upscale: float, count: int, out: str) -> None:
    """Draws `count` samples, spread over the data set by a fixed permutation, to the picture file `out`."""
    samples = np.sort(Permutation(len(index), (0,))(np.arange(min(count, len(index)))))
    num_rows = -(-len(samples) // _NUM_COLUMNS)
    figure = Figure(figsize=(3 * _NUM_COLUMNS, 3.6 * num_rows), layout="tight")
    axes = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    reader = ShardReader()
    for axis, sample in zip(axes.flat, samples.tolist(), strict=False):
        try:
            data = reader.image(index, sample)
            axis.imshow(decode_image(data, index.size_px(sample), index.size_px(sample)))
        except SampleError as fault:
            axis.text(0.5, 0.5, textwrap.fill(str(fault), 24), ha="center", va="center", color="red", fontsize=8)
        axis.set_title(_describe(index, sample, resolutions, max_upscale), fontsize=8)
    figure.savefig(out, dpi=80)


def _describe(index: Index, sample: int, resolutions: Sequence[Resolution], max_upscale: float) -> str:
    height, width = index.size_px(sample)
    parts = []
    for resolution in resolutions:
        buckets = resolution_buckets(resolution)
        row = assign_buckets(np.array([height]), np.array([width]), buckets, max_upscale)[0]
        parts.append("-" if row < 0 else "{}x{}".format(*buckets[row]))
    status = CaptionStatus(index.status(index.captions[0], np.array([sample]))[0])
    caption = index.caption(sample) or f"({status.name.lower()} caption)"
    lines = textwrap.wrap(caption, _CAPTION_COLUMNS, max_lines=_CAPTION_LINES, placeholder=" ..")
    # A dollar sign would start mathematical notation.
    text = "\n".join(lines).replace("$", r"\$")
    return f"{index.name(sample)}  {height}x{width}\nbuckets: {' | '.join(parts)}\n{text}"
