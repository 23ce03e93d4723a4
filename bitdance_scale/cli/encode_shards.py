"""Encodes the images of a run into bit shards, once for all epochs.

    bitdance encode CONFIG --out FOLDER [section.key=value ...]

The run of CONFIG then trains with `data.bits_dir=FOLDER` and reads no image any more. The ranks divide the shards
between them; a job that was stopped goes on where it was; some samples of every shard are read back and encoded again.
With `data.augment`, every image is encoded in several views (`data.augment.bits_crops`), of which training draws one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch, rank_arguments
from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import check_named_files
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.rules import check
from bitdance_scale.demo.shards import check_shipped_sets


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--out", type=Path, required=True, help="folder of the bit shards; the run's data.bits_dir")
    parser.add_argument(
        "--verify", type=int, default=4, metavar="N", help="samples of each shard to encode again (default: 4)"
    )
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    check(config, None)
    check_shipped_sets(spec for source in config.data.active_sources for spec in source.shards)
    check_named_files(config, reads_text=False)
    # All ranks encode, whatever the layout of the run.
    _, starting = find_replicas(options, ParallelSection())
    if starting is not None:
        return launch(starting, "bitdance_scale.cli.encode_shards", rank_arguments(options, ("config", "overrides")))
    # Imported late: torch takes seconds, and a refused configuration should not wait for it.
    from bitdance_scale.train.encode_bits import run_encode

    return run_encode(config, options.out, options.verify)


if __name__ == "__main__":
    raise SystemExit(main())
