"""Draws some demo scenes of GenEval's six categories with a published model and says how often they are right.

    python tools/score_scenes.py PUBLISHED --out scores --size 64x64 --per-category 50
    python tools/score_scenes.py --real --out scores               # the scorer on drawn scenes
    python tools/score_scenes.py PUBLISHED --real --out scores     # on scenes through the tokenizer: a model's limit

Prompts are those of the benchmark `demo-scenes`, the scorer is `bitdance_scale/evaluation/scenes`. Written are
OUT/score.json (shares right by category), OUT/pictures.jsonl (prompt, score and what was seen, per picture),
OUT/grid.png and, unless --no-pictures, the pictures. The overall score is the mean of the categories, as in GenEval
(arXiv 2310.11513), with a bootstrap interval over prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.demo.scenes import Scene, render
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES, DemoScenes, choose_scenes
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.catalogue import SCENES
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from bitdance_scale.evaluation.scenes.scorer import BACKGROUND, EXACT, SceneScorer
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.requests import parse_size
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.vision.tokenizer import VisionTokenizer

GRID_PER_CATEGORY = 6


@dataclass(frozen=True)
class Scored:
    """One picture, its prompt and its score."""

    prompt: Prompt
    image: Image.Image
    score: ImageScore


def score_pictures(prompts: Sequence[Prompt], images: Iterator[Image.Image]) -> list[Scored]:
    """Reads one picture per prompt and judges it by the prompt."""
    scorer, scored = SceneScorer(), []
    for prompt, image in zip(prompts, images, strict=True):
        (score,) = scorer([DrawnImage(prompt, 0, np.asarray(image.convert("RGB")))])
        scored.append(Scored(prompt, image, score))
    return scored


def summarize(scored: Sequence[Scored]) -> dict[str, object]:
    """Shares of right pictures: `overall` with its interval, and by category; and what else the metric has."""
    found = estimates([item.score for item in scored], SCENES.combine)
    overall = found[OVERALL]
    return {
        "overall": round(overall.value, 4),
        "interval": [round(overall.low, 4), round(overall.high, 4)],
        "correct": {category: round(found[category].value, 4) for category in CATEGORIES if category in found},
        "exact": round(found[EXACT].value, 4),
        "background": round(found[BACKGROUND].value, 4) if BACKGROUND in found else None,
        "num_pictures": len(scored),
    }


def draw_pictures(
    pipeline: BitDancePipeline,
    prompts: Sequence[str],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
) -> Iterator[Image.Image]:
    """A picture of each prompt, in order; picture i from seed `seed` + i. `size` is (height, width)."""
    with tqdm(total=len(prompts), unit="picture", mininterval=5) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))]
            yield from pipeline(
                batch, *size, num_inference_steps=steps, guidance_scale=guidance, generator=generators
            ).images
            bar.update(len(batch))


def real_pictures(scenes: Sequence[Scene], vision: VisionTokenizer | None, side_px: int) -> Iterator[Image.Image]:
    """The scenes as drawn; with a tokenizer encoded and decoded, at about `side_px` for the shorter side."""
    for scene in scenes:
        image = render(scene)
        if vision is None:
            yield image
            continue
        multiple = vision.section.downsample * vision.section.block_side
        scale = side_px / min(image.size) / multiple
        width, height = (multiple * max(1, round(scale * side)) for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.LANCZOS)))
        (bits,) = vision.encode([pixels])
        grid = (height // vision.section.downsample, width // vision.section.downsample)
        yield Image.fromarray(vision.decode(bits, grid).numpy())


def write_results(out: Path, scored: Sequence[Scored], settings: dict[str, object], keeps_pictures: bool) -> None:
    """Writes the files that the module's description names."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {"settings": settings} | summarize(scored)
    (out / "score.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (out / "pictures.jsonl").open("w", encoding="utf-8") as record:
        for number, item in enumerate(scored):
            line = {
                "number": number,
                "prompt": item.prompt.text,
                "category": item.score.category,
                "score": item.score.value,
                "reason": item.score.reason,
            }
            record.write(json.dumps(line) + "\n")
            if keeps_pictures:
                item.image.save(out / f"{number:05d}.png")
    shown = [item for category in CATEGORIES for item in _first(scored, category)]
    captions = [("" if item.score.value else "WRONG: ") + item.prompt.text for item in shown]
    image_grid([np.asarray(item.image) for item in shown], captions, out / "grid.png", GRID_PER_CATEGORY)


def _first(scored: Sequence[Scored], category: str) -> list[Scored]:
    return [item for item in scored if item.score.category == category][:GRID_PER_CATEGORY]


def format_summary(summary: dict[str, object]) -> str:
    """The summary as lines of text."""
    low, high = summary["interval"]
    return "\n".join(
        [
            *(f"{category:18s} {share:.3f}" for category, share in summary["correct"].items()),
            f"{'overall':18s} {summary['overall']:.3f}   ({low:.3f} to {high:.3f}; {summary['num_pictures']} pictures)",
            f"{'nothing else':18s} {summary['exact']:.3f}",
        ]
    )


def _images(arguments: argparse.Namespace, scenes: Sequence[Scene]) -> Iterator[Image.Image]:
    size = parse_size(arguments.size)
    if arguments.folder is None:
        return real_pictures(scenes, None, min(size))
    pipeline = BitDancePipeline.from_pretrained(arguments.folder)
    if arguments.real:
        return real_pictures(scenes, pipeline.model.vision, min(size))
    return draw_pictures(
        pipeline,
        [scene.caption for scene in scenes],
        size,
        arguments.steps,
        arguments.guidance,
        arguments.seed,
        arguments.batch_size,
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.folder is None and not arguments.real:
        raise ConfigError("name a published folder, or pass --real")
    for name in ("per_category", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ConfigError(f"--out {arguments.out}: is there already; name a new folder")
    scenes = choose_scenes(arguments.per_category)
    prompts = DemoScenes(per_category=arguments.per_category).read(None)
    scored = score_pictures(prompts, _images(arguments, scenes))
    names = ("size", "per_category") if arguments.real else ("size", "per_category", "steps", "guidance", "seed")
    settings = {name: getattr(arguments, name) for name in names} | {"real": arguments.real}
    write_results(arguments.out, scored, settings, arguments.pictures)
    print(format_summary(summarize(scored)))
    return EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="published folder of a model of demo scenes")
    parser.add_argument("--real", action="store_true", help="score the scenes themselves")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not be there yet")
    parser.add_argument("--size", default="64x64", help="HEIGHTxWIDTH in pixels (default: %(default)s)")
    parser.add_argument("--per-category", type=int, default=50, help="pictures per category (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps per block (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale, 1 for none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=25, help="pictures drawn together (default: %(default)s)")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write no single pictures")
    return run_command(parser, arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
