"""Draws captioned scenes as WebDataset shards, the data of the demo; or as a plain folder of pictures.

    bitdance demo-data                                               data/demo and data/demo_held_out: what `demo` reads
    bitdance demo-data data/tokenizer data/tokenizer_held_out        what `demo_tokenizer` reads
    bitdance demo-data data/demo_classes data/demo_classes_held_out  what `class_demo` reads
    bitdance demo-data OUT --images 500 --seed 7                     another set; with --classes, one of classes
    bitdance demo-data OUT --folder --images 100 --style corners     pictures with .txt captions, in a style

Equal arguments give equal bytes. Held-out images come from another seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.demo.shards import (
    CLASS_SETS,
    DEFAULT_IMAGES,
    MIX_NAMES,
    SHIPPED_SETS,
    STYLES,
    ShippedSet,
    write_folder,
    write_shards,
)
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

DEMO_FOLDERS = ["data/demo", "data/demo_held_out"]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "out", nargs="*", default=[], metavar="OUT", help=f"folders to make (default: {' '.join(DEMO_FOLDERS)})"
    )
    parser.add_argument(
        "--images", type=positive, help=f"images of each (default: {DEFAULT_IMAGES}, or what a set of the demo has)"
    )
    parser.add_argument("--per-shard", type=positive, default=500, help="images per tar (default: 500)")
    parser.add_argument("--seed", type=int, help="seed of the scenes (default: 0, or that of a set of the demo)")
    parser.add_argument("--classes", action="store_true", help="small scenes of classes by colour and shape")
    parser.add_argument("--folder", action="store_true", help="a folder of .jpg and .txt files instead of shards")
    parser.add_argument("--style", choices=STYLES, default="", help="of all pictures (default: none)")
    parser.add_argument(
        "--mix",
        choices=MIX_NAMES,
        help="all kinds alike, mostly one large object, or mostly several (default: that of a set of the demo)",
    )
    parser.add_argument("--force", action="store_true", help="replace a demo data set of other arguments")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    for out in options.out or DEMO_FOLDERS:
        shipped = SHIPPED_SETS.get(out, ShippedSet(DEFAULT_IMAGES, 0))
        num_images, mix = options.images or shipped.num_images, options.mix or shipped.mix
        seed = shipped.seed if options.seed is None else options.seed
        start_s = time.monotonic()
        has_classes = options.classes or out in CLASS_SETS
        if has_classes and options.mix:
            raise ConfigError(f"{out}: --mix {options.mix}: class scenes have no mix; leave it out")
        if options.folder:
            _refuse_classes(out, has_classes)
            is_new = write_folder(out, num_images, seed, options.force, options.style, mix)
        else:
            is_new = write_shards(
                out, num_images, options.per_shard, seed, options.force, has_classes, options.style, mix
            )
        if is_new:
            print(f"{out}: {num_images} images written in {time.monotonic() - start_s:.1f} s")
        else:
            print(f"{out}: complete already ({num_images} images, seed {seed})")
    return EXIT_COMPLETE


def _refuse_classes(out: str, has_classes: bool) -> None:
    if has_classes:
        raise ConfigError(f"--folder: {out} has classes, which a folder of captions has no place for; leave it out")
