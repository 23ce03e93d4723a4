"""Draws images of prompts with a trained model, or with the small one that comes with the package.

    bitdance sample demo                                             # the demo's model and its prompts
    bitdance sample demo --prompt "two green stars"
    bitdance sample runs/demo                                        # a run: its newest checkpoint and its prompts
    bitdance sample runs/demo/checkpoints/step_00000920 --prompt "a red cube" run.dtype=float32
    bitdance sample FOLDER --prompts prompts.txt --out drawn --size 1024x1024
    bitdance sample FOLDER --prompt "a red cube" --out drawn --seed 7 --adapter my_style=0.8

MODEL is a published folder, or a run, a checkpoint or an import, with which one process draws. A run, and its export,
draw the run's prompts with its size, steps and guidance ([sample]; sampling.json in the export) unless told otherwise;
a folder of the release draws at 1024x1024 with 50 steps and guidance 7.5. A class-conditional run draws classes:
--prompt is a number or a name. A folder named `demo` here comes before the package's model.

A prompt file is text with one prompt per line, or .jsonl with {"prompt": .., "seed": .., "height": .., "width": ..} per
line, of which only the prompt is required. Image i has the seed --seed + i unless its line gives one. An image depends
on its own seed, prompt and settings, not on the others in its batch. The files written are OUT/00000.png and so on,
grid.png with the first 64 images, and requests.jsonl with one line per image as it is finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, run_command
from bitdance_scale.config.ranges import CONSTRAINTS, Choice
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.generate.requests import Request
    from bitdance_scale.generate.sampling_file import Sampling

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    samplers = CONSTRAINTS["sample.sampler"]
    assert isinstance(samplers, Choice)
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "model", type=model_path, metavar="MODEL", help="published folder, run, checkpoint or import; or demo"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings of a run, such as its files"
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--prompts", type=Path, metavar="FILE", help="prompt file, text or .jsonl")
    wanted.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--config", metavar="CONFIG", help="configuration that gives an import the settings of a run")
    parser.add_argument("--out", type=Path, help="folder to write, which must be empty (default: a new one in samples)")
    parser.add_argument("--force", action="store_true", help="replace the images of an earlier run in OUT")
    parser.add_argument("--size", metavar="HxW", help="in pixels (default: MODEL's)")
    parser.add_argument("--steps", type=int, help="sampling steps per block (default: MODEL's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: MODEL's)")
    parser.add_argument("--sampler", choices=samplers.values, help="default: MODEL's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images drawn together (default: 4)")
    parser.add_argument("--dtype", choices=DTYPES, help="of a published folder: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="of a published folder (default: cuda where there is one)")
    add_adapter_argument(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    # Imported late: torch takes seconds, and a wrong option should not wait for it.
    from bitdance_scale.generate.image_sizes import beyond_published
    from bitdance_scale.generate.requests import (
        GRID_NAME,
        batch_of,
        batches,
        check_out,
        clear_out,
        draw_requests,
    )
    from bitdance_scale.train.drawer import find_model

    # What can be refused is, before minutes of loading.
    for text in options.overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r}: is no section.key=value; give a prompt with --prompt {text!r}")
    out = options.out or _new_folder(options.model.resolve().name)
    check_out(out, is_forced=options.force)
    model = find_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        overrides=options.overrides,
        config_name=options.config,
        adapters=options.adapter,
    )
    sampling = _chosen(options, model.sampling)
    requests = _requests(options, sampling)
    if not requests:
        raise ConfigError(f"{options.model}: has no prompts of its own; name some with --prompt or --prompts")
    for group in batches(requests, options.batch_size):
        model.check(batch_of(group, sampling, model.facts.adapters))
    for size in sorted({(request.height, request.width) for request in requests}.difference(model.facts.sizes_px)):
        if note := beyond_published(*size, model.facts.vision):
            print(f"note: {note}", file=sys.stderr)
    with model.load() as drawer:
        clear_out(out)
        draw_requests(drawer, requests, out, sampling=sampling, batch_size=options.batch_size, record=model.record)
    print(f"wrote {out}: {len(requests)} pictures, and {out / GRID_NAME} with their prompts under them")
    return EXIT_COMPLETE


def _new_folder(name: str) -> Path:
    """A folder for the pictures of a model that is not there yet: samples/NAME, samples/NAME-2 and so on."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("samples") / name for name in names) if not path.exists())


def _chosen(options: argparse.Namespace, usual: Sampling) -> Sampling:
    """The settings of the model where no option gives others."""
    from bitdance_scale.generate.requests import parse_size

    given = {"num_steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    given["size_px"] = None if options.size is None else parse_size(options.size)
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def _requests(options: argparse.Namespace, sampling: Sampling) -> list[Request]:
    from bitdance_scale.generate.requests import Request, check_prompt, read_requests

    size, prompts = sampling.size_px, options.prompt or sampling.prompts
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    if not 0 <= options.seed < 2**62:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^62 - 1")
    if options.prompts is not None:
        return read_requests(options.prompts, size, options.seed)
    for text in prompts:
        check_prompt("--prompt" if options.prompt else f"{options.model}: prompts", text)
    return [Request(number, text, options.seed + number, *size) for number, text in enumerate(prompts)]
