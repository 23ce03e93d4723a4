"""Measures a visual tokenizer on images that it was not trained on: one table, and one page with --out.

    bitdance tokenizer evaluate FOLDER data/imagenet_validation --out OUT --lpips-alex FILE --inception FILE
    bitdance tokenizer evaluate FOLDER data/tokenizer_held_out --sizes 32 64 128

FOLDER holds ae.safetensors and ae_config.json. It may also be a weights file of the release, such as
ae_d32c128.safetensors with ae_d32c128_config.json beside it. The table has PSNR, also with 1% of the bits flipped,
SSIM, LPIPS and rFID where the weights of their networks are named, and how the bits are used. The ranks share out the
images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch, rank_arguments
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.tokenizer_schema import SSIM_PX
from bitdance_scale.errors import ConfigError

if TYPE_CHECKING:
    from bitdance_scale.train.tokenizer_measurement import Measuring

_ORIGINAL = "original"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the weights, or the weights file")
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tars of held-out images: files, folders, globs")
    parser.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        default=[256, _ORIGINAL],
        metavar="PX",
        help="sides of square centre crops in pixels, or `original` for whole images, cut to sides that the "
        "downsampling divides (default: 256 original)",
    )
    parser.add_argument("--images", type=positive, metavar="N", help="images per size, the first ones (default: all)")
    parser.add_argument("--lpips-alex", type=Path, metavar="FILE", help="torchvision's weights of AlexNet")
    parser.add_argument("--lpips-vgg", type=Path, metavar="FILE", help="torchvision's weights of VGG-16")
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch_fidelity's weights of Inception, for rFID"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of evaluation.json, .md and .html")
    parser.add_argument(
        "--shown", type=positive, default=8, metavar="N", help="images of a kind on the page (default: 8)"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="picture of the first crops of every size")
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _size(text: str) -> int | str:
    """The type of --sizes."""
    return text if text == _ORIGINAL else positive(text)


def _run(options: argparse.Namespace) -> int:
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is no folder; name one, which is made if it is missing")
    measuring = _measuring(options)
    _, starting = find_replicas(options, ParallelSection())
    if starting is not None:
        return launch(starting, "bitdance_scale.cli.evaluate_tokenizer", rank_arguments(options, ("folder", "shards")))
    # Imported late: a refused option should not wait for Megatron.
    from bitdance_scale.train.measure_tokenizer import run_measuring

    return run_measuring(measuring)


def _measuring(options: argparse.Namespace) -> Measuring:
    """What is measured, with its files checked."""
    from bitdance_scale.data.held_out import HeldOutSize
    from bitdance_scale.evaluation.inception import check_inception_weights
    from bitdance_scale.evaluation.pairs import NUM_COLUMNS
    from bitdance_scale.train.tokenizer_measurement import Measuring
    from bitdance_scale.vision.perceptual import LPIPS_MIN_PX, Network, check_lpips_weights
    from bitdance_scale.vision.weights import find_autoencoder

    _, sizes = find_autoencoder(options.folder)
    given: dict[Network, Path | None] = {"alex": options.lpips_alex, "vgg": options.lpips_vgg}
    lpips = {network: path for network, path in given.items() if path is not None}
    for network, path in lpips.items():
        check_lpips_weights(network, path)
    if options.inception is not None:
        check_inception_weights(options.inception)
    downsampling = 2 ** (len(sizes["channel_mult"]) - 1)
    min_px = max([SSIM_PX, *(LPIPS_MIN_PX[network] for network in lpips)])
    asked = dict.fromkeys(options.sizes)
    for size in asked:
        if size != _ORIGINAL and (size % downsampling or size < max(min_px, 2 * downsampling)):
            raise ConfigError(
                f"--sizes {size}: must be a multiple of {downsampling}, the downsampling, with at least two cells a "
                f"side, and at least {min_px} px, the shortest side that "
                f"{'SSIM' if not lpips else 'SSIM and LPIPS'} can be computed of"
            )
    return Measuring(
        weights=options.folder,
        shards=options.shards,
        sizes=[HeldOutSize(None if size == _ORIGINAL else (size, size), downsampling, min_px) for size in asked],
        num_images=options.images,
        lpips=lpips,
        inception=options.inception,
        num_shown=max(options.shown, NUM_COLUMNS) if options.picture else options.shown,
        out=options.out,
        picture=options.picture,
    )


if __name__ == "__main__":
    raise SystemExit(main())
