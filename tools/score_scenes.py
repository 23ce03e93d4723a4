"""Draws GenEval's six categories with a model of demo scenes, reads the pictures and says how often they are right.

    python tools/score_scenes.py PUBLISHED --out scores --size 64x64 --per-category 50
    python tools/score_scenes.py --real --out scores               # the scorer on drawn scenes
    python tools/score_scenes.py PUBLISHED --real --out scores     # on scenes through the tokenizer: a model's limit

Prompts are captions of scenes that no demo data set holds. Written are OUT/score.json (shares right by category),
OUT/pictures.jsonl (prompt, seed, verdict and what was seen, per picture), OUT/grid.png and, unless --no-pictures, the
pictures. The overall score is the mean of the categories, as in GenEval (arXiv 2310.11513).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scene_prompts import Verdict, judge, parse_caption
from scene_reading import SeenScene, read_scene
from tqdm import tqdm

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.demo.scenes import Scene, render
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES, choose_scenes
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.requests import parse_size
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.vision.tokenizer import VisionTokenizer

GRID_PER_CATEGORY = 6


@dataclass(frozen=True)
class Scored:
    """One picture: its scene (of which the model was given the caption), what is seen in it, and the verdict."""

    scene: Scene
    category: str
    image: Image.Image
    seen: SeenScene
    verdict: Verdict


def score_pictures(scenes: Sequence[Scene], images: Iterator[Image.Image]) -> list[Scored]:
    """Reads one picture per scene and judges it by the scene's caption."""
    scored = []
    for scene, image in zip(scenes, images, strict=True):
        asked, seen = parse_caption(scene.caption), read_scene(image)
        scored.append(Scored(scene, asked.category, image, seen, judge(asked, seen)))
    return scored


def summarize(scored: Sequence[Scored]) -> dict[str, object]:
    """Shares of right pictures: `overall`, and `correct` and `exact` by category (see `Verdict`); `num_pictures`."""
    correct, exact = {}, {}
    for category in dict.fromkeys(item.category for item in scored):
        verdicts = [item.verdict for item in scored if item.category == category]
        correct[category] = round(float(np.mean([verdict.is_correct for verdict in verdicts])), 4)
        exact[category] = round(float(np.mean([verdict.is_exact for verdict in verdicts])), 4)
    grounds = [item.verdict.is_background_right for item in scored]
    asked = [right for right in grounds if right is not None]
    return {
        "overall": round(float(np.mean(list(correct.values()))), 4),
        "overall_exact": round(float(np.mean(list(exact.values()))), 4),
        "correct": correct,
        "exact": exact,
        "background": round(float(np.mean(asked)), 4) if asked else None,
        "num_pictures": len(scored),
        # Of a share measured on n independent pictures, 95 %.
        "error": round(1.96 * math.sqrt(0.25 / len(scored)), 4),
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
                "prompt": item.scene.caption,
                "category": item.category,
                "verdict": dataclasses.asdict(item.verdict),
                "seen": dataclasses.asdict(item.seen),
            }
            record.write(json.dumps(line) + "\n")
            if keeps_pictures:
                item.image.save(out / f"{number:05d}.png")
    shown = [item for category in CATEGORIES for item in _first(scored, category)]
    captions = [("" if item.verdict.is_correct else "WRONG: ") + item.scene.caption for item in shown]
    image_grid([np.asarray(item.image) for item in shown], captions, out / "grid.png", GRID_PER_CATEGORY)


def _first(scored: Sequence[Scored], category: str) -> list[Scored]:
    return [item for item in scored if item.category == category][:GRID_PER_CATEGORY]


def format_summary(summary: dict[str, object]) -> str:
    """The summary as lines of text."""
    lines = [
        f"{category:18s} {share:.3f}   nothing else in the picture {summary['exact'][category]:.3f}"
        for category, share in summary["correct"].items()
    ]
    overall = f"{'overall':18s} {summary['overall']:.3f}   nothing else in the picture {summary['overall_exact']:.3f}"
    return "\n".join([*lines, f"{overall}   ({summary['num_pictures']} pictures, +- {summary['error']:.3f})"])


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
    scored = score_pictures(scenes, _images(arguments, scenes))
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
