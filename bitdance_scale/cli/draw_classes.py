"""Draws images of every class with a class-conditional network, as ADM's evaluation suite reads them.

    bitdance draw CONFIG --out FOLDER [--from RUN] [--per-class 50] [--batch-size 64] [section.key=value ...]

`samples.npz` gets all images in order of their classes; `[sample]` of CONFIG says how they are drawn. The ranks divide
the batches between them, and a job that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch
from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import check_named_files
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--from", dest="where", metavar="RUN", help="run folder, checkpoint or import (default: the run of CONFIG)"
    )
    parser.add_argument("--per-class", type=positive, default=50, metavar="N", help="images of a class (default: 50)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="drawn together (default: 64)")
    parser.add_argument("--images", action="store_true", help="write every image as a PNG, too")
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    # The rules of the number of ranks are of training: there is no batch to share out.
    check(config, None)
    if config.model.parts.has_text:
        raise ConfigError(
            f"{options.config}: model.family = {config.model.family!r} draws from prompts, not from classes; export "
            "the run and use `bitdance sample`"
        )
    check_named_files(config, reads_text=False)
    where = options.where or str(Path(config.run.root) / config.run.name)
    _, starting = find_replicas(options, config.parallel)
    if starting is not None:
        values = [f"--out={options.out}", f"--from={where}"]
        values += [f"--per-class={options.per_class}", f"--batch-size={options.batch_size}"]
        command = [options.config, *options.overrides, *values, *(["--images"] if options.images else [])]
        return launch(starting, "bitdance_scale.cli.draw_classes", command)
    # Imported late: torch takes seconds, and a refused configuration should not wait for it.
    from bitdance_scale.train.draw_classes import Drawing, run_draw

    return run_draw(config, Drawing(options.out, where, options.per_class, options.batch_size, options.images))


if __name__ == "__main__":
    raise SystemExit(main())
