"""How sizes, aspects, captions and scores are distributed in an index, as text and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import summary, suspicious_shards

_SHORT_SIDES_PX = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ASPECTS = (0.25, 0.33, 0.5, 0.67, 0.8, 1.25, 1.5, 2.0, 3.0, 4.0)
_BAR_COLUMNS = 40
_NUM_SUSPICIOUS = 20


def report(index: Index) -> str:
    """Counts, histograms of sizes and aspects, scores, and shards to look at."""
    sizes = index.sizes_px(slice(None))
    short, aspect = sizes.min(axis=1), sizes[:, 1] / sizes[:, 0]
    lines = summary(index)
    lines += ["short side, px:", *_bars(short, _SHORT_SIDES_PX), "width over height:", *_bars(aspect, (0, *_ASPECTS))]
    suspicious = list(suspicious_shards(index))
    if suspicious:
        lines.append(f"{len(suspicious)} suspicious shards:")
        lines += [f"  {path}: {reason}" for path, reason in suspicious[:_NUM_SUSPICIOUS]]
        if len(suspicious) > _NUM_SUSPICIOUS:
            lines.append(f"  and {len(suspicious) - _NUM_SUSPICIOUS} more")
    return "\n".join(lines)


def plot(index: Index, out: Path) -> None:
    """The distributions of size, aspect, caption length and every score, as a picture."""
    sizes = index.sizes_px(slice(None))
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    lengths = index.caption_bytes(index.captions[0], slice(None))
    panels = [
        ("short side, px", short, np.geomspace(16, 8192, 60), "log"),
        ("long side, px", long, np.geomspace(16, 8192, 60), "log"),
        ("width over height", sizes[:, 1] / sizes[:, 0], np.geomspace(1 / 8, 8, 61), "log"),
        (f"bytes of caption {index.captions[0]}", lengths, 60, "linear"),
        *((field, index.score(field), 60, "linear") for field in index.scores),
    ]
    num_rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 2.8 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for axis, (title, values, bins, scale) in zip(axes, panels, strict=False):
        # Infinity, which a record may say, has no place on an axis.
        known = values[np.isfinite(values)]
        axis.hist(known, bins=bins, color="#3567b0")
        axis.set(title=f"{title} ({len(known):,} samples)", xscale=scale, yticks=[])
    for axis in list(figure.axes)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(f"{len(index):,} samples in {len(index.shards):,} shards")
    figure.savefig(out, dpi=110)


def _bars(values: np.ndarray, edges: tuple[float, ...]) -> list[str]:
    counts, _ = np.histogram(values, bins=[*edges, np.inf])
    most = max(1, int(counts.max()))
    return [
        f"  from {edge:>6g}: {count:>12,}  {'#' * -(-int(count) * _BAR_COLUMNS // most)}"
        for edge, count in zip(edges, counts.tolist(), strict=True)
    ]
