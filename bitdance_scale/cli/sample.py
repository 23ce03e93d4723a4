"""Draws images of prompts with a published BitDance folder.

    bitdance sample FOLDER --prompts prompts.txt --out samples --size 1024x1024
    bitdance sample FOLDER --prompt "a red cube on a blue ball" --out samples --seed 7
    bitdance sample FOLDER --prompt "a red cube" --out samples --adapter my_style=0.8

A prompt file is text with one prompt per line, or .jsonl with {"prompt": .., "seed": .., "height": .., "width": ..} per
line, of which only the prompt is required. Image i has the seed --seed + i unless its line gives one. An image depends
on its own seed, prompt and settings, not on the others in its batch. The files written are OUT/00000.png and so on,
grid.png with the first 64 images, and requests.jsonl with one line per image as it is finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, run_command
from bitdance_scale.config.ranges import CONSTRAINTS, Choice
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.generate.requests import Request

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    samplers = CONSTRAINTS["sample.sampler"]
    assert isinstance(samplers, Choice)
    parser = CommandParser(prog, __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="published folder")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompts", type=Path, metavar="FILE", help="prompt file, text or .jsonl")
    wanted.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must be empty")
    parser.add_argument("--force", action="store_true", help="replace the images of an earlier run in OUT")
    parser.add_argument("--size", default="1024x1024", help="HEIGHTxWIDTH in pixels (default: 1024x1024)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps per block (default: 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale, 1 for none (default: 7.5)")
    parser.add_argument("--sampler", choices=samplers.values, default=samplers.values[0], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images drawn together (default: 4)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one")
    add_adapter_argument(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    import torch

    from bitdance_scale.checkpoint.named_adapters import parse_adapters
    from bitdance_scale.generate.image_sizes import beyond_published, check_size
    from bitdance_scale.generate.pipeline import BitDancePipeline
    from bitdance_scale.generate.published_model import read_sections
    from bitdance_scale.generate.requests import check_out, clear_out, draw_requests
    from bitdance_scale.generate.sampler import FlowSolver

    # What can be refused is, before minutes of loading.
    check_out(options.out, is_forced=options.force)
    FlowSolver(options.steps, options.guidance, options.sampler)
    requests = _requests(options)
    vision = read_sections(options.folder).vision
    for size in sorted({(request.height, request.width) for request in requests}):
        check_size(*size, vision)
        if note := beyond_published(*size, vision):
            print(f"note: {note}", file=sys.stderr)
    adapters = parse_adapters(options.adapter)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    pipeline = BitDancePipeline.from_pretrained(options.folder, dtype, options.device, adapters)
    clear_out(options.out)
    draw_requests(
        pipeline,
        requests,
        options.out,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        batch_size=options.batch_size,
        record={"folder": str(options.folder)} | ({"adapters": options.adapter} if adapters else {}),
    )
    print(f"wrote {options.out}")
    return EXIT_COMPLETE


def _requests(options: argparse.Namespace) -> list[Request]:
    from bitdance_scale.generate.requests import Request, parse_size, read_requests

    size = parse_size(options.size)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    if not 0 <= options.seed < 2**62:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^62 - 1")
    if options.prompts is not None:
        return read_requests(options.prompts, size, options.seed)
    return [Request(number, text, options.seed + number, *size) for number, text in enumerate(options.prompt)]
