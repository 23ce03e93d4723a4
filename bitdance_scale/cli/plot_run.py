"""Draws one page of a run, or of several, from what their folders hold: also of a run that is still going.

    bitdance plot RUN [RUN ...] --out FILE [--one-after-another]

RUN is a run folder, such as runs/demo. Several are drawn over each other, a colour each; with --one-after-another they
are stages, each beginning where the one before it ended. The run of a tokenizer has a page of its own kind and is drawn
alone.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.atomic_files import replacing, write_bytes
from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png or .webp to write")
    parser.add_argument("--one-after-another", action="store_true", help="the runs are stages, in this order")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from bitdance_scale.observe.overview import overview
    from bitdance_scale.observe.run_record import read_run
    from bitdance_scale.observe.tokenizer_overview import is_tokenizer_run, read_tokenizer_run, tokenizer_overview

    tokenizers = [folder for folder in options.runs if is_tokenizer_run(folder)]
    if tokenizers and len(options.runs) > 1:
        raise ConfigError(f"{tokenizers[0]}: is the run of a tokenizer, which is drawn alone; name it by itself")
    try:
        if tokenizers:
            tokenizer = read_tokenizer_run(tokenizers[0])
            _write(options.out, tokenizer_overview(tokenizer))
            print(f"{tokenizer.name}: {tokenizer.summary()}")
            return EXIT_COMPLETE
        runs = [read_run(folder) for folder in options.runs]
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist; name folders of runs, such as runs/demo") from error
    _write(options.out, overview(runs, one_after_another=options.one_after_another))
    for run in runs:
        print(f"{run.name}: {run.summary()}")
    return EXIT_COMPLETE


def _write(out: Path, page: bytes) -> None:
    """Writes a page, given as PNG, as the suffix of the file says."""
    if out.suffix != ".webp":
        write_bytes(out, page)
        return
    from PIL import Image

    with replacing(out) as aside:
        Image.open(io.BytesIO(page)).convert("RGB").save(aside, format="WEBP", quality=85, method=6)
