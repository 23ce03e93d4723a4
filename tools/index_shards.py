"""Builds the index of WebDataset shards ahead of training, and reports what is in them.

    python tools/index_shards.py /data/laion --workers 16
    python tools/index_shards.py s3://bucket/laion --index-dir /shared/laion_index
    python tools/index_shards.py '/data/laion/{00000..09999}.tar' --captions json:re_caption --plot laion.png

Only shards that are new or changed since the last time are read; a build that was stopped goes on where it was. The
index lies where training looks for it (`data.index_dir`, or beside the first shard), unless --index-dir says otherwise.
Exit code 1: shards were damaged or lost samples (the index is complete but for those).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from bitdance_scale.config.schema import S3Section
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, ShardEntry, default_index_dir
from bitdance_scale.data.index.report import skipped_samples, summary, suspicious_shards
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import BitDanceError

_SHORT_SIDES_PX = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ASPECTS = (0.25, 0.33, 0.5, 0.67, 0.8, 1.25, 1.5, 2.0, 3.0, 4.0)
_BAR_COLUMNS = 40
_NUM_SUSPICIOUS = 20


def report(index: Index) -> str:
    """Counts, histograms of sizes and aspects, scores, and shards to look at."""
    short = np.minimum(index.height_px, index.width_px)
    aspect = index.width_px / index.height_px
    lines = summary(index)
    lines += ["short side, px:", *_bars(short, _SHORT_SIDES_PX), "width over height:", *_bars(aspect, (0, *_ASPECTS))]
    suspicious = list(suspicious_shards(index))
    if suspicious:
        lines.append(f"{len(suspicious)} suspicious shards:")
        lines += [f"  {path}: {reason}" for path, reason in suspicious[:_NUM_SUSPICIOUS]]
        if len(suspicious) > _NUM_SUSPICIOUS:
            lines.append(f"  and {len(suspicious) - _NUM_SUSPICIOUS} more")
    return "\n".join(lines)


def plot(index: Index, out: str) -> None:
    """The distributions of size, aspect, caption length and every score, as a picture."""
    short, long = np.minimum(index.height_px, index.width_px), np.maximum(index.height_px, index.width_px)
    lengths = np.diff(index.columns[f"caption.{index.captions[0]}_start"])
    panels = [
        ("short side, px", short, np.geomspace(16, 8192, 60), "log"),
        ("long side, px", long, np.geomspace(16, 8192, 60), "log"),
        ("width over height", index.width_px / index.height_px, np.geomspace(1 / 8, 8, 61), "log"),
        (f"bytes of caption {index.captions[0]}", lengths, 60, "linear"),
        *((field, index.score(field), 60, "linear") for field in index.scores),
    ]
    num_rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 2.8 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for axis, (title, values, bins, scale) in zip(axes, panels, strict=False):
        values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
        axis.hist(values, bins=bins, color="#3567b0")
        axis.set(title=f"{title} ({len(values):,} samples)", xscale=scale, yticks=[])
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


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="+", help="tars, folders, globs or brace lists; s3://BUCKET/..")
    parser.add_argument("--index-dir", default="", help="index folder; default: .bitdance_index beside the first shard")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="captions to keep beside `caption`: members by extension (alt.txt), or fields (json:re_caption)",
    )
    parser.add_argument("--workers", type=int, help="processes that read; default: by the amount to read")
    parser.add_argument("--endpoint-url", default="", help="of an S3-compatible store (data.s3.endpoint_url)")
    parser.add_argument("--profile", default="", help="of boto3's credentials (data.s3.profile)")
    parser.add_argument("--anonymous", action="store_true", help="unsigned requests to S3 (data.s3.anonymous)")
    parser.add_argument("--plot", default="", metavar="PNG", help="draws the distributions to this picture")
    arguments = parser.parse_args()
    try:
        section = S3Section(
            endpoint_url=arguments.endpoint_url, profile=arguments.profile, anonymous=arguments.anonymous
        )
        stores = Stores(section)
        shards = expand_shards(arguments.dataset, "DATASET", stores)
        captions = tuple(dict.fromkeys((DEFAULT_SOURCE, *arguments.captions)))
        index_dir = arguments.index_dir or default_index_dir(shards)
        with tqdm(total=len(shards), unit="shard", disable=None) as bar:

            def progress(entry: ShardEntry) -> None:
                bar.update()
                for damage in entry.tar_errors:
                    bar.write(f"{entry.path}: byte {damage.offset}: {damage.problem}", file=sys.stderr)

            index = build_index(shards, index_dir, captions=captions, num_workers=arguments.workers, progress=progress)
        print(report(index))
        if arguments.plot:
            plot(index, arguments.plot)
            print(f"wrote {arguments.plot}")
        print(f"index in {index_dir}")
    except BitDanceError as error:
        sys.exit(f"error: {error}")
    return 1 if skipped_samples(index) else 0


if __name__ == "__main__":
    sys.exit(main())
