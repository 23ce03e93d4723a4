"""Draws some demo scenes of GenEval's six categories with a published model and says how often they are right.

    python tools/score_scenes.py PUBLISHED --out scores --size 64x64 --per-category 50
    python tools/score_scenes.py --real --out scores               # the scorer on drawn scenes
    python tools/score_scenes.py PUBLISHED --real --out scores     # on scenes through the tokenizer: a model's limit

Prompts are those of the benchmark `demo-scenes`, the scorer is `bitdance_scale/evaluation/scenes`. Written are
OUT/score.json (shares right by category), OUT/pictures.jsonl (prompt, score and what was seen, per picture),
OUT/grid.png and, unless --no-pictures, the pictures. The overall score is the mean of the categories, as in GenEval
(arXiv 2310.11513), with an interval of 95 % over prompts. `by_chance` is what the same pictures score for the other
prompts of their category: what a model would reach that draws such scenes and does not read its prompts.
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

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.demo.scenes import Scene, render
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES, DemoScenes, choose_scenes
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.catalogue import SCENES
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.scenes.reading import SeenScene, read_scene
from bitdance_scale.evaluation.scenes.scorer import BACKGROUND, EXACT, score_seen, shares_by_chance
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.requests import parse_size
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.vision.tokenizer import VisionTokenizer

GRID_PER_CATEGORY = 6


@dataclass(frozen=True)
class ScoreRequest:
    """What is to be scored.

    Attributes:
        folder: published folder; None: the scenes as drawn.
        is_real: whether the pictures are the scenes themselves, of a folder encoded and decoded by its tokenizer.
        size_px: (height, width) of the pictures; of real ones the shorter side counts.
        per_category: pictures of each category.
        steps: sampling steps per block.
        guidance: guidance scale; 1 is none.
        seed: of the first picture.
        batch_size: pictures drawn together.
    """

    folder: Path | None
    is_real: bool
    size_px: tuple[int, int]
    per_category: int
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0
    batch_size: int = 25

    @property
    def settings(self) -> dict[str, object]:
        """As score.json has them."""
        settings: dict[str, object] = {
            "size": "{}x{}".format(*self.size_px),
            "per_category": self.per_category,
            "real": self.is_real,
        }
        if not self.is_real:
            settings |= {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}
        return settings


@dataclass(frozen=True)
class Scored:
    """One picture, its prompt, what it shows and its score."""

    prompt: Prompt
    image: Image.Image
    seen: SeenScene
    score: ImageScore


def score_pictures(prompts: Sequence[Prompt], images: Iterator[Image.Image]) -> list[Scored]:
    """Reads one picture per prompt and judges it by the prompt."""
    scored = []
    for prompt, image in zip(prompts, images, strict=True):
        seen = read_scene(image.convert("RGB"))
        scored.append(Scored(prompt, image, seen, score_seen(prompt, 0, seen)))
    return scored


def make_score(request: ScoreRequest, out: Path, *, keeps_pictures: bool, shows_progress: bool = True) -> str:
    """Draws, judges and writes the files that the module's description names; returns the summary as lines of text."""
    scenes = choose_scenes(request.per_category)
    prompts = DemoScenes(per_category=request.per_category).read(None)
    with tqdm(total=len(scenes), unit="picture", mininterval=5, disable=not shows_progress) as bar:
        scored = score_pictures(prompts, _counted(_images(request, scenes), bar))
    write_results(out, scored, request.settings, keeps_pictures)
    return format_summary(summarize(scored))


def _counted(images: Iterator[Image.Image], bar: tqdm) -> Iterator[Image.Image]:
    for image in images:
        yield image
        bar.update()


def summarize(scored: Sequence[Scored]) -> dict[str, object]:
    """Shares of right pictures: `overall` with its interval, and by category; and what else the metric has."""
    found = estimates([item.score for item in scored], SCENES.combine)
    overall = found[OVERALL]
    chance = shares_by_chance([item.prompt.text for item in scored], [item.seen for item in scored])
    return {
        "overall": round(overall.value, 4),
        "interval": [round(overall.low, 4), round(overall.high, 4)],
        "correct": {category: round(found[category].value, 4) for category in CATEGORIES if category in found},
        "by_chance": {category: round(chance[category], 4) for category in CATEGORIES if category in chance},
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
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))]
        yield from pipeline(
            batch, *size, num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images


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
    chance = {name: f"   (by chance {share:.3f})" for name, share in summary["by_chance"].items()}
    return "\n".join(
        [
            *(
                f"{category:18s} {share:.3f}{chance.get(category, '')}"
                for category, share in summary["correct"].items()
            ),
            f"{'overall':18s} {summary['overall']:.3f}   ({low:.3f} to {high:.3f}; {summary['num_pictures']} pictures)",
            f"{'nothing else':18s} {summary['exact']:.3f}",
        ]
    )


def _images(request: ScoreRequest, scenes: Sequence[Scene]) -> Iterator[Image.Image]:
    if request.folder is None:
        return real_pictures(scenes, None, min(request.size_px))
    pipeline = BitDancePipeline.from_pretrained(request.folder)
    if request.is_real:
        return real_pictures(scenes, pipeline.model.vision, min(request.size_px))
    return draw_pictures(
        pipeline,
        [scene.caption for scene in scenes],
        request.size_px,
        request.steps,
        request.guidance,
        request.seed,
        request.batch_size,
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.folder is None and not arguments.real:
        raise ConfigError("name a published folder, or pass --real")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ConfigError(f"--out {arguments.out}: is there already; name a new folder")
    request = ScoreRequest(
        arguments.folder,
        arguments.real,
        parse_size(arguments.size),
        arguments.per_category,
        arguments.steps,
        arguments.guidance,
        arguments.seed,
        arguments.batch_size,
    )
    print(make_score(request, arguments.out, keeps_pictures=arguments.pictures))
    return EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("folder", type=model_path, nargs="?", help="published folder of a model of scenes, or demo")
    parser.add_argument("--real", action="store_true", help="score the scenes themselves")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not be there yet")
    parser.add_argument("--size", default="64x64", help="HEIGHTxWIDTH in pixels (default: %(default)s)")
    parser.add_argument(
        "--per-category", type=positive, default=50, help="pictures per category (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps per block (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale, 1 for none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=25, help="pictures drawn together (default: %(default)s)"
    )
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write no single pictures")
    return run_command(parser, arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
