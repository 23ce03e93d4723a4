"""Makes a checkpoint of released weights: of a published BitDance folder, or of a Qwen3 folder to pretrain from.

    bitdance import BitDance-14B-16x imported
    bitdance import Qwen3-14B imported --autoencoder BitDance-Tokenizer/ae_d16c32.safetensors

A Qwen3 gets the resolution and query tokens (new embedding rows: the mean of the old ones plus small noise), a
diffusion head and a projector with initial values, and the autoencoder whose weights file is named (`ae_config.json`,
or `NAME_config.json` for NAME.safetensors, beside it). OUT is a run folder at step 0; a run starts from it under any
layout:

    bitdance train CONFIG run.start_from=imported text.path=imported/tokenizer vision.weights=imported/ae.safetensors

Weights are copied part by part, so memory does not grow with the model. docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.wording import file_size

_NEW_PARTS = ("autoencoder", "block_side", "seed", "head_width", "head_blocks", "head_adaln")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="published BitDance folder, or Qwen3 folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier import at OUT")
    qwen3 = parser.add_argument_group("for a Qwen3 folder")
    qwen3.add_argument("--autoencoder", type=Path, help="weights file of the vision tokenizer (required)")
    qwen3.add_argument("--block-side", type=int, metavar="P", help="side p of the blocks (default: 4)")
    qwen3.add_argument("--seed", type=int, help="seed of new embedding rows, head and projector (default: 0)")
    qwen3.add_argument(
        "--head-width", type=int, metavar="N", help="width of the diffusion head (default: the backbone's)"
    )
    qwen3.add_argument("--head-blocks", type=int, metavar="N", help="its transformer blocks (default: 6)")
    qwen3.add_argument("--head-adaln", type=int, metavar="N", help="its adaLN modules (default: 2)")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitdance_scale.checkpoint.import_release import import_release
    from bitdance_scale.checkpoint.release_source import NewParts, open_source

    given = {name: value for name in _NEW_PARTS if (value := getattr(options, name)) is not None}
    source = open_source(options.source, NewParts(**given) if given else None)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    num_bytes = 2 * source.num_bytes - source.num_drawn_bytes
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        import_release(source, options.out, is_forced=options.force, on_bytes=bar.update)
    print(f"{options.out}: {file_size(source.num_bytes)}; start a run from it with run.start_from={options.out}")
    return EXIT_COMPLETE
