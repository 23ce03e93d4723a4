"""Draws a figure of what a model draws: every prompt over pictures of the first seeds, none of them chosen.

    python tools/picture_figure.py demo --out docs/images/demo_samples.webp --prompts docs/images/demo_samples.txt
    python tools/picture_figure.py PUBLISHED --out FILE --prompts prompts.txt --per-prompt 4

MODEL is a published folder, or the name of one that comes with the package. Size, steps, guidance and, unless a file
has others, prompts are its own (`sampling.json`). The figure is as wide as a page of GitHub shows it, about 850 px.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from bitdance_scale.atomic_files import replacing
from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.requests import read_requests
from bitdance_scale.generate.sampling_file import Sampling, read_sampling
from bitdance_scale.observe.figures import TEXT_COLOUR, wrap_caption
from bitdance_scale.train.process import EXIT_COMPLETE

WIDTH_PX, MARGIN_PX, GAP_PX = 850, 16, 4
FONT_PX, LINE_PX = 17, 22


def figure_of(prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """The figure, `WIDTH_PX` wide.

    Args:
        prompts: at least one.
        pictures: of each prompt, equally many; all of one size.
        columns: prompts side by side.
    """
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=FONT_PX)
    cell_px = (WIDTH_PX - (columns + 1) * MARGIN_PX) // columns
    per_prompt, (width, height) = len(pictures[0]), pictures[0][0].size
    picture_px = (cell_px - (per_prompt - 1) * GAP_PX) // per_prompt
    size = (picture_px, round(picture_px * height / width))
    texts = [wrap_caption(prompt, font, cell_px) for prompt in prompts]
    starts = range(0, len(prompts), columns)
    num_lines = [max(len(lines) for lines in texts[start : start + columns]) for start in starts]
    heights = [LINE_PX * lines + size[1] + MARGIN_PX for lines in num_lines]
    sheet = Image.new("RGB", (WIDTH_PX, sum(heights) + MARGIN_PX), "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN_PX
    for start, lines, row_px in zip(starts, num_lines, heights, strict=True):
        for column, number in enumerate(range(start, min(start + columns, len(prompts)))):
            left = MARGIN_PX + column * (cell_px + MARGIN_PX)
            for place, line in enumerate(texts[number]):
                # Short prompts stand right above their pictures.
                line_top = top + LINE_PX * (lines - len(texts[number]) + place)
                pen.text((left, line_top), line, fill=TEXT_COLOUR, font=font)
            for place, picture in enumerate(pictures[number]):
                shown = picture.resize(size, Image.Resampling.LANCZOS)
                sheet.paste(shown, (left + place * (picture_px + GAP_PX), top + LINE_PX * lines))
        top += row_px
    return sheet


def _run(options: argparse.Namespace) -> int:
    if options.out.suffix not in (".webp", ".png"):
        raise ConfigError(f"--out {options.out}: name a .webp or a .png file")
    sampling = read_sampling(options.model) or Sampling()
    prompts = list(sampling.prompts)
    if options.prompts is not None:
        prompts = [request.prompt for request in read_requests(options.prompts, sampling.size_px, 0)]
    if not prompts:
        raise ConfigError(f"{options.model}: has no prompts of its own; name a file of some with --prompts")
    pipeline = BitDancePipeline.from_pretrained(options.model)
    pictures = [
        pipeline(
            prompt,
            *sampling.size_px,
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance,
            sampler=sampling.sampler,
            num_images_per_prompt=options.per_prompt,
            generator=[torch.Generator().manual_seed(seed) for seed in range(options.per_prompt)],
        ).images
        for prompt in prompts
    ]
    with replacing(options.out) as aside:
        figure = figure_of(prompts, pictures, options.columns)
        figure.save(aside, options.out.suffix[1:].upper(), quality=90, method=6)
    print(f"{options.out}: {len(prompts)} prompts, seeds 0 to {options.per_prompt - 1} of each")
    return EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("model", type=model_path, metavar="MODEL", help="published folder, or demo")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".webp or .png to write")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (default: the model's)")
    parser.add_argument("--per-prompt", type=positive, default=3, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--columns", type=positive, default=2, help="prompts side by side (default: %(default)s)")
    return run_command(parser, arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
