"""Describes images with a published BitDance folder, in the words of its image-to-text training.

    bitdance caption FOLDER picture.jpg other.png
    bitdance caption FOLDER pictures --out captions.jsonl --batch-size 8
    bitdance caption FOLDER pictures --top-p 0.9 --temperature 0.8 --seed 7

IMAGE is a file, or a folder with all images below it. A caption takes the most probable token at every place, unless
--top-p or --temperature is given; then tokens are drawn, with numbers that depend on --seed and the name of the file
and not on the other images. An image is fitted to the --size nearest in aspect, as in training; by default to the sizes
that the release samples at. The lines of FILE are JSON, one for each image as its batch is finished.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, positive, run_command
from bitdance_scale.config.ranges import CONSTRAINTS, Choice
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    contexts = CONSTRAINTS["vision.context"]
    assert isinstance(contexts, Choice)
    parser = CommandParser(prog, __doc__)
    parser.add_argument("folder", type=model_path, metavar="FOLDER", help="published folder, or demo")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="file, or folder of images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to write (default: captions are printed)")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the tokens that make up this probability")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw, with logits divided by T")
    parser.add_argument("--seed", type=int, default=0, help="of all images (default: 0)")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="longest caption (default: 512)")
    parser.add_argument(
        "--size", action="append", default=[], metavar="HxW", help="in pixels; may be given several times"
    )
    parser.add_argument("--max-upscale", type=float, default=1.0, metavar="X", help="largest enlargement (default: 1)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="described together (default: 4)")
    parser.add_argument(
        "--context", choices=contexts.values, help="how an image is laid (default: as FOLDER says it was trained)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one")
    add_adapter_argument(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    _check_options(options)
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    import torch
    from tqdm import tqdm

    from bitdance_scale.checkpoint.named_adapters import parse_adapters
    from bitdance_scale.generate.caption_decode import TokenChoice
    from bitdance_scale.generate.caption_pipeline import CaptionPipeline
    from bitdance_scale.generate.caption_requests import (
        caption_buckets,
        describe_images,
        find_images,
        plan_captions,
        write_line,
    )
    from bitdance_scale.generate.published_model import read_sections
    from bitdance_scale.generate.requests import parse_size

    # What can be refused is, before minutes of loading.
    choice = TokenChoice(options.top_p, options.temperature)
    vision = read_sections(options.folder).vision
    buckets = caption_buckets([parse_size(text) for text in options.size], vision)
    requests = plan_captions(find_images(options.images), buckets, options.max_upscale)
    context = options.context or vision.context
    dtype = getattr(torch, options.dtype) if options.dtype else None
    adapters = parse_adapters(options.adapter)
    pipeline = CaptionPipeline.from_pretrained(options.folder, dtype, options.device, context, adapters)
    settings: dict[str, object] = {"folder": str(options.folder), "context": context}
    if adapters:
        settings["adapters"] = options.adapter
    if not choice.is_greedy:
        settings |= {"top_p": choice.top_p, "temperature": choice.temperature, "seed": options.seed}
    with contextlib.ExitStack() as opened:
        # Captions on the screen are progress enough.
        bar = opened.enter_context(tqdm(total=len(requests), unit="image", disable=None if options.out else True))
        lines = opened.enter_context(options.out.open("w", encoding="utf-8")) if options.out else None
        said = describe_images(
            pipeline, requests, choice, options.seed, options.max_tokens, options.batch_size, bar.update
        )
        for request, caption in said:
            if lines is not None:
                write_line(lines, request, caption, settings)
            else:
                print(f"{request.path}: {caption.text}{'' if caption.is_ended else ' [cut]'}")
    if options.out:
        print(f"wrote {options.out}")
    return EXIT_COMPLETE


def _check_options(options: argparse.Namespace) -> None:
    """Refuses what needs no model to be read.

    Raises:
        ConfigError: the seed or a number is not possible, FILE is there, or FOLDER is no published text-to-image model.
    """
    if not 0 <= options.seed < 2**31:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^31 - 1")
    if not 1 <= options.max_upscale < float("inf"):
        raise ConfigError(f"--max-upscale {options.max_upscale}: must be at least 1, which allows no enlargement")
    if options.out is not None and options.out.exists() and (options.out.is_dir() or not options.force):
        way_out = "name a file" if options.out.is_dir() else "name another file, or replace it with --force"
        raise ConfigError(f"--out {options.out}: is there already; {way_out}")
    if options.out is not None and not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}; make it, or name another")
    _check_model(options.folder)


def _check_model(folder: Path) -> None:
    """Refuses what is no published text-to-image folder; says what it is, and what to do with it."""
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME
    from bitdance_scale.checkpoint.start_weights import model_checkpoint
    from bitdance_scale.config.load import load_network
    from bitdance_scale.config.published_class import SIZES_NAME
    from bitdance_scale.weight_files import PICKLED_SUFFIXES

    if (folder.is_file() and folder.suffix in PICKLED_SUFFIXES) or (folder / SIZES_NAME).is_file():
        raise ConfigError(
            f"FOLDER {folder}: is no published text-to-image folder. A class-conditional network has no words, so it "
            "cannot describe an image; name the folder of a text-to-image model"
        )
    checkpoint = model_checkpoint(folder, "FOLDER", "a published folder, as `bitdance export RUN FOLDER` writes it")
    if checkpoint is None:
        return
    if not load_network(checkpoint / CONFIG_NAME).model.parts.has_text:
        raise ConfigError(
            f"FOLDER {folder}: is a run of a class-conditional network, which has no words and cannot describe an "
            "image; name a text-to-image model"
        )
    raise ConfigError(
        f"FOLDER {folder}: is a run or a checkpoint; export it first: `bitdance export {folder} PUBLISHED`, then "
        "`bitdance caption PUBLISHED IMAGE ..`"
    )
