"""Makes a checkpoint of released weights: of a published BitDance, or of a Qwen3 folder to pretrain from.

    bitdance import BitDance-14B-16x imported                     # as the release, or in diffusers' layout
    bitdance import Qwen3-14B imported --autoencoder BitDance-Tokenizer/ae_d16c32.safetensors
    bitdance import BitDance_B_4x.pt imported                     # a class-conditional network
    bitdance import ae_d16c32.pt autoencoder                      # an autoencoder by itself

A Qwen3 gets the resolution and query tokens (new embedding rows: the mean of the old ones plus small noise), a
diffusion head and a projector with initial values, and the autoencoder whose weights file is named (`ae_config.json`,
or `NAME_config.json` for NAME.safetensors, beside it). OUT is a run folder at step 0; a run starts from it under any
layout:

    bitdance train CONFIG run.start_from=imported text.path=imported/tokenizer vision.weights=imported/ae.safetensors

A `.pt` file is read as tensors alone. Of a class-conditional one, `model` becomes the weights and `ema` the averages of
the checkpoint; a file with one of them gives the weights. An autoencoder by itself becomes ae.safetensors and
ae_config.json. Weights are copied part by part, so memory does not grow with the model. docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.wording import file_size, first_few

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.pickled_files import PickledFile
    from bitdance_scale.checkpoint.release_source import Source

_CLASS_OPTIONS = ("weights", "config")
_QWEN3_PARTS = ("block_side", "seed", "head_width", "head_blocks", "head_adaln")
_NEW_PARTS = ("autoencoder", *_QWEN3_PARTS)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "source", type=model_path, metavar="SOURCE", help="published BitDance folder or .pt file, Qwen3 folder; or demo"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier import at OUT")
    parser.add_argument(
        "--autoencoder",
        type=Path,
        help="weights file of the vision tokenizer, for a Qwen3 folder or a class-conditional file without one",
    )
    classes = parser.add_argument_group("for a class-conditional .pt file")
    classes.add_argument("--weights", choices=("trained", "averaged"), help="only these weights (model, or ema)")
    classes.add_argument("--config", type=Path, help="configuration whose sizes the file must have (default: its own)")
    qwen3 = parser.add_argument_group("for a Qwen3 folder")
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

    from bitdance_scale.checkpoint.autoencoder_source import import_autoencoder
    from bitdance_scale.checkpoint.import_release import import_release
    from bitdance_scale.checkpoint.pickled_files import STATE_ENTRY

    file = _pickled(options.source)
    if file is not None and STATE_ENTRY in file.entries:
        _refuse_options(options, (*_CLASS_OPTIONS, *_NEW_PARTS), "an autoencoder by itself")
        if file.ignored:
            print(f"note: {file.path}: not read: {first_few(file.ignored)}", file=sys.stderr)
        import_autoencoder(file, options.out, is_forced=options.force)
        print(f"{options.out}: an autoencoder; name it with vision.weights={options.out}/ae.safetensors")
        return EXIT_COMPLETE
    source = _open(options, file)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    num_bytes = 2 * source.num_bytes - source.num_drawn_bytes
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        import_release(source, options.out, is_forced=options.force, on_bytes=bar.update)
    print(f"{options.out}: {file_size(source.num_bytes)}; start a run from it with run.start_from={options.out}")
    return EXIT_COMPLETE


def _pickled(source: Path) -> PickledFile | None:
    """The file of torch.save that is to be imported; None: it is a folder."""
    from bitdance_scale.checkpoint.pickled_files import PickledFile
    from bitdance_scale.config.published_class import PICKLE_NAME
    from bitdance_scale.pickled_weights import SAFETENSORS_SUFFIX

    if not source.is_file():
        return None
    if source.suffix == SAFETENSORS_SUFFIX:
        raise ConfigError(
            f"{source}: safetensors are not imported by themselves. An autoencoder needs no import: name it with "
            "vision.weights=FILE, or with --autoencoder beside a Qwen3 folder. Of a class-conditional export name "
            f"{PICKLE_NAME}, of any other model its folder"
        )
    return PickledFile(source)


def _open(options: argparse.Namespace, file: PickledFile | None) -> Source:
    """Checks what is to be imported."""
    from bitdance_scale.checkpoint.class_source import open_class_source
    from bitdance_scale.checkpoint.release_source import NewParts, open_source

    if file is not None:
        _refuse_options(options, _QWEN3_PARTS, "a class-conditional file")
        return open_class_source(file, weights=options.weights, config=options.config, autoencoder=options.autoencoder)
    _refuse_options(options, _CLASS_OPTIONS, "a folder")
    given = {name: value for name in _NEW_PARTS if (value := getattr(options, name)) is not None}
    return open_source(options.source, NewParts(**given) if given else None)


def _refuse_options(options: argparse.Namespace, names: Sequence[str], what: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {options.source} is {what}, which has none; leave it out")
