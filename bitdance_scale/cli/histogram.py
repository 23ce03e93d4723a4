"""Draws how the diffusion head's predictions of held-out images are distributed, at fixed flow times.

    bitdance histogram CONFIG --out FILE.png [--from RUN] [--times 0,0.25,0.5,0.75,0.95] [section.key=value ...]

`[evaluate]` of CONFIG says which images, noise and weights. FILE.json gets the numbers: shares of each bin, and the
share of the predictions that are within 0.25 of -1 or 1, although nothing confines them (arXiv 2602.14041 Fig. 9).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch
from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import check_named_files
from bitdance_scale.config.parallel_rules import held_out_faults
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError

DEFAULT_TIMES = "0,0.25,0.5,0.75,0.95"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="PNG to write; the numbers go beside it"
    )
    parser.add_argument(
        "--from", dest="where", metavar="RUN", help="run folder, checkpoint or import (default: the run of CONFIG)"
    )
    parser.add_argument(
        "--times", type=_times, default=DEFAULT_TIMES, metavar="T,T", help=f"flow times (default: {DEFAULT_TIMES})"
    )
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise ConfigError(f"--out {options.out}: must be the name of a PNG file, such as histogram.png")
    config = load_config(options.config, options.overrides)
    # The rules of the number of ranks are of training: there is no batch to share out but the held-out images.
    check(config, None)
    if config.head.kind == "bitwise":
        raise ConfigError(
            f"{options.config}: head.kind = 'bitwise' has no flow time, and gives the odds of a bit rather than the "
            "bit; only the diffusion head predicts clean bits from noisy ones. Name a run with head.kind = 'diffusion'"
        )
    if not config.evaluate.shards:
        raise ConfigError(
            f"{options.config}: evaluate.shards = []: there are no held-out images to predict; name some, such as "
            "evaluate.shards='[\"data/held_out\"]'"
        )
    check_named_files(config)
    where = options.where or str(Path(config.run.root) / config.run.name)
    num_ranks, starting = find_replicas(options, config.parallel)
    if faults := [*held_out_faults(config, num_ranks)]:
        raise ConfigError("\n".join(faults))
    if starting is not None:
        values = [f"--out={options.out}", f"--from={where}", f"--times={','.join(map(repr, options.times))}"]
        return launch(starting, "bitdance_scale.cli.histogram", [options.config, *options.overrides, *values])
    # Imported late: torch takes seconds, and a refused configuration should not wait for it.
    from bitdance_scale.train.prediction_histogram import run_histogram

    return run_histogram(config, where, options.times, options.out)


def _times(text: str) -> tuple[float, ...]:
    """The type of an option that is a list of flow times."""
    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        times = ()
    if not times or not all(0 <= time <= 1 for time in times):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers from 0 to 1 with commas, such as {DEFAULT_TIMES}")
    return times


if __name__ == "__main__":
    raise SystemExit(main())
