"""Shows what is in WebDataset shards: counts, errors, and a picture grid of samples with captions and buckets.

    bitdance inspect data/demo --config demo --count 24 --out grid.png
    bitdance inspect --config demo                                        what the configuration trains on

A sample is drawn as it is stored. Its title says its stored size, the bucket that it is trained at in each resolution,
and its caption. With --config it is also said what a small data set lacks: images that fill a bucket, captions, images
for one step. Without --config the resolutions are 256, 512 and 1024 px with the sizes that the published release
samples at. Without DATASET the shards are those of --config, each source counted by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "dataset", nargs="*", default=[], metavar="DATASET", help="tars, folders, globs, brace lists; none: --config's"
    )
    parser.add_argument("--config", help="run configuration whose data.resolutions and data.max_upscale are used")
    parser.add_argument(
        "--index-dir", default="", help="index folder (default: .bitdance_index beside the first shard)"
    )
    parser.add_argument("--count", type=positive, default=24, metavar="N", help="samples drawn (default: 24)")
    parser.add_argument("--out", type=Path, default=Path("shards.png"), help="picture to write (default: shards.png)")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    if not options.dataset and not options.config:
        raise ConfigError("there is nothing to inspect: name a DATASET or a --config")
    config = load_config(options.config) if options.config else None
    if config is not None and not options.dataset:
        check(config, None)

    from bitdance_scale.data.index.build import build_index
    from bitdance_scale.data.index.index import default_index_dir
    from bitdance_scale.data.inspection import RELEASE_RESOLUTIONS, draw_grid, report, source_report
    from bitdance_scale.data.plan.small_set import remarks
    from bitdance_scale.data.storage.shards import expand_shards
    from bitdance_scale.train.shared_index import training_index

    resolutions = RELEASE_RESOLUTIONS if config is None else config.data.resolutions
    max_upscale = 1.0 if config is None else config.data.max_upscale
    if config is None or options.dataset:
        shards = expand_shards(options.dataset, "DATASET")
        index = build_index(shards, options.index_dir or default_index_dir(shards))
        print(report(index, resolutions, max_upscale))
        data = None if config is None else dataclasses.replace(config.data, shards=tuple(shards), sources=())
    else:
        data = dataclasses.replace(config.data, index_dir=options.index_dir or config.data.index_dir)
        index = training_index(data)
        print(report(index, resolutions, max_upscale))
        if data.sources:
            print(source_report(index, data))
    for remark in remarks(index, data) if data is not None else ():
        print(remark)
    draw_grid(index, resolutions, max_upscale, options.count, options.out)
    print(f"wrote {options.out}")
    return EXIT_COMPLETE
