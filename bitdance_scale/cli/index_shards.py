"""Builds the index of WebDataset shards ahead of training, and reports what is in them.

    bitdance index /data/laion --workers 16
    bitdance index s3://bucket/laion --index-dir /shared/laion_index
    bitdance index '/data/laion/{00000..09999}.tar' --captions json:re_caption --plot laion.png
    bitdance index /data/laion --verify

Only shards that are new or changed since the last time are read; a build that was stopped goes on where it was. The
index is written where training looks for it (`data.index_dir`, or beside the first shard), unless --index-dir names
another folder. Exit code 1: the index is complete but for samples that damaged shards have lost. --verify builds
nothing: it reads index and shards again and names every image that is not what was indexed, by shard and bytes; exit
code 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.errors import DataError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.data.index.index import ShardEntry
    from bitdance_scale.data.storage.stores import Stores

EXIT_SAMPLES_LOST = 1


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "dataset", nargs="+", metavar="DATASET", help="tars, folders, globs, brace lists; s3://BUCKET/.."
    )
    parser.add_argument(
        "--index-dir", default="", help="index folder (default: .bitdance_index beside the first shard)"
    )
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="captions to keep beside `caption`: members by extension (alt.txt), or fields (json:re_caption)",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes that read (default: by the amount)")
    parser.add_argument("--endpoint-url", default="", help="of an S3-compatible store (data.s3.endpoint_url)")
    parser.add_argument("--profile", default="", help="of boto3's credentials (data.s3.profile)")
    parser.add_argument("--anonymous", action="store_true", help="unsigned requests to S3 (data.s3.anonymous)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the distributions to this picture")
    parser.add_argument("--verify", action="store_true", help="compare the index and its shards with what was indexed")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitdance_scale.data.captions import DEFAULT_SOURCE
    from bitdance_scale.data.index.build import build_index
    from bitdance_scale.data.index.distributions import plot, report
    from bitdance_scale.data.index.index import default_index_dir
    from bitdance_scale.data.index.report import skipped_samples
    from bitdance_scale.data.storage.shards import expand_shards
    from bitdance_scale.data.storage.stores import Stores

    stores = Stores(S3Section(endpoint_url=options.endpoint_url, profile=options.profile, anonymous=options.anonymous))
    shards = expand_shards(options.dataset, "DATASET", stores)
    captions = tuple(dict.fromkeys((DEFAULT_SOURCE, *options.captions)))
    index_dir = options.index_dir or default_index_dir(shards)
    if options.verify:
        return _verify(options, Path(index_dir), shards, stores)
    with tqdm(total=len(shards), unit="shard", disable=None) as bar:

        def progress(entry: ShardEntry) -> None:
            bar.update()
            for tar_error in entry.tar_errors:
                bar.write(f"{entry.path}: byte {tar_error.offset}: {tar_error.problem}", file=sys.stderr)

        index = build_index(
            shards, index_dir, captions=captions, num_workers=options.workers, stores=stores, progress=progress
        )
    print(report(index))
    if options.plot:
        plot(index, options.plot)
        print(f"wrote {options.plot}")
    print(f"index in {index_dir}")
    return EXIT_SAMPLES_LOST if skipped_samples(index) else EXIT_COMPLETE


def _verify(options: argparse.Namespace, index_dir: Path, shards: Sequence[str], stores: Stores) -> int:
    """Reads the index of these shards again, and the shards."""
    from tqdm import tqdm

    from bitdance_scale.data.index.comparison import changed_shards
    from bitdance_scale.data.index.index import find_table, open_index
    from bitdance_scale.data.index.known_shards import closest_table
    from bitdance_scale.data.index.verification import find_damage

    table = find_table(index_dir, shards) or closest_table(index_dir, shards)
    if table is None:
        raise DataError(
            f"{index_dir}: no usable index of any of these {len(shards)} shards. Build it: `bitdance index` without "
            "--verify."
        )
    indexed = {entry.path for entry in table.shards}
    for path in shards:
        if path not in indexed:
            print(f"{path}: is not in the index; `bitdance index` adds it")
    damaged = find_damage(index_dir, table.segments, is_whole=True)
    for entry, damage in damaged.items():
        print(f"{index_dir / entry.file}: {damage}")
    if damaged:
        print(f"{len(damaged)} segments of the index are damaged; `bitdance index` reads their shards again")
        return EXIT_SAMPLES_LOST
    index, num_changed = open_index(table.path, is_verified=True), 0
    with tqdm(total=len(index.shards), unit="shard", disable=None) as bar:
        for change in changed_shards(index, stores, options.workers):
            bar.update()
            num_changed += bool(change.problems)
            for problem in change.problems:
                bar.write(f"{change.entry.path}: {problem}", file=sys.stdout)
    print(f"{len(index)} images in {len(index.shards)} shards compared; {num_changed} shards have changed")
    return EXIT_SAMPLES_LOST if num_changed else EXIT_COMPLETE
