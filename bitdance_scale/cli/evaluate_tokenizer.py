"""Measures a visual tokenizer on images that it was not trained on, and draws originals over reconstructions.

    bitdance tokenizer evaluate FOLDER data/tokenizer_held_out --sizes 32 64 128 --picture out.png

Prints a Markdown table: PSNR with and without 1% of flipped bits, and how the bits are used; then the time per image.
FOLDER holds ae.safetensors and ae_config.json. It may also be a weights file of the release, such as
ae_d32c128.safetensors with ae_d32c128_config.json beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the weights, or the weights file")
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars of held-out images: files, folders, globs")
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[32, 64, 128],
        metavar="PX",
        help="sides of square crops in pixels (default: 32 64 128)",
    )
    parser.add_argument("--images", type=positive, default=256, metavar="N", help="images per size (default: 256)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="picture to write")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    import torch

    from bitdance_scale.data.crop_stream import centre_crops
    from bitdance_scale.data.index.build import build_index
    from bitdance_scale.data.index.index import default_index_dir
    from bitdance_scale.data.storage.shards import expand_shards
    from bitdance_scale.train.tokenizer_evaluation import evaluate, summary
    from bitdance_scale.train.tokenizer_report import CODE_BITS, draw, load_autoencoder, milliseconds_per_image

    autoencoder = load_autoencoder(options.folder)
    shards = expand_shards(options.shards, "SHARDS")
    index = build_index(shards, default_index_dir(shards))
    images = {size: centre_crops(index, (size, size), options.images) for size in options.sizes}
    num_groups = autoencoder.encoder.conv_out.out_channels // CODE_BITS
    results = {size: evaluate(autoencoder, images[size], num_groups, torch.device("cpu")) for size in images}
    print(summary({(size, size): result for size, result in results.items()}))
    for size in images:
        encode_ms, decode_ms = milliseconds_per_image(autoencoder, images[size])
        print(f"{size} px: encode {encode_ms:.1f} ms, decode {decode_ms:.1f} ms on {torch.get_num_threads()} thread(s)")
    if options.picture:
        draw(images, results).save(options.picture)
    return EXIT_COMPLETE
