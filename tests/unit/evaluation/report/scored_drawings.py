"""Folders of drawings with scores: demo scenes whose pictures are right or those of other scenes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.demo.scenes import make_scene, render
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.manifest import Drawing, begin_drawing, read_drawing
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import Scores, write_scores

BENCHMARK = DemoScenes(num_images=2, per_category=3)
SIZE_PX = (32, 32)
SETTINGS = {"steps": 25, "guidance": 3.0, "sampler": "euler_maruyama", "dtype": "float32", "batch_size": 8}


@cache
def scene_prompts() -> tuple[Prompt, ...]:
    return tuple(BENCHMARK.read(None))


@cache
def picture(index: int) -> np.ndarray:
    scene = dataclasses.replace(make_scene(7, index), size_px=SIZE_PX[::-1])
    return np.asarray(render(scene))


def write_drawing(
    root: Path,
    *,
    name: str = "small",
    sha256: str = "a" * 64,
    block_tokens: int = 16,
    seed: int = 0,
    size_px: tuple[int, int] = SIZE_PX,
    **settings: Any,
) -> Path:
    """A drawing of all prompts; its pictures are some scenes."""
    drawing = Drawing.of(
        BENCHMARK,
        scene_prompts(),
        model={"name": name, "block_tokens": block_tokens, "sha256": sha256},
        size_px=size_px,
        settings=SETTINGS | settings,
        seed=seed,
    )
    begin_drawing(root, drawing)
    folder = ImageFolder(root, BENCHMARK.layout(name), scene_prompts(), size_px)
    for number, prompt in enumerate(scene_prompts()):
        images = [picture(2 * number + k) for k in range(prompt.num_images)]
        folder.write(prompt, [np.asarray(Image.fromarray(image).resize(size_px[::-1])) for image in images])
    return root


def image_scores(share: float, seed: int = 1) -> tuple[ImageScore, ...]:
    """Scores of all images, right with a probability."""
    rng = np.random.default_rng(seed)
    return tuple(
        ImageScore(
            prompt.id, k, prompt.category, right, {prompt.category: (right, 1.0)}, "" if right else "no red star"
        )
        for prompt in scene_prompts()
        for k in range(prompt.num_images)
        for right in [float(rng.random() < share)]
    )


def scenes_scores(root: Path, images: tuple[ImageScore, ...], **changes: Any) -> Scores:
    """Scores of the metric `scenes` of a drawing."""
    scores = Scores(
        "scenes",
        BENCHMARK.name,
        read_drawing(root)["model"]["name"],
        read_drawing(root),
        {"reader": "image analysis"},
        {prompt.id: prompt.text for prompt in scene_prompts()},
        images,
        notes=("a note of the scorer",),
    )
    return dataclasses.replace(scores, **changes)


def score(
    root: Path, share: float = 0.5, seed: int = 1, images: tuple[ImageScore, ...] | None = None, **changes: Any
) -> Path:
    """Writes scores of `scenes`; returns the folder."""
    found = image_scores(share, seed) if images is None else images
    write_scores(root, scenes_scores(root, found, **changes))
    return root


def score_set(root: Path, figures: Mapping[str, float]) -> Path:
    """Writes scores of `distribution`, which has values of the whole set alone; returns the folder."""
    write_scores(root, scenes_scores(root, (), metric="distribution", figures=figures, notes=()))
    return root


def score_clip(root: Path, mean: float, seed: int = 1) -> Path:
    """Writes scores of `clip-score`; returns the folder."""
    rng = np.random.default_rng(seed)
    images = tuple(
        ImageScore(prompt.id, k, prompt.category, value, {OVERALL: (value, 1.0)})
        for prompt in scene_prompts()
        for k in range(prompt.num_images)
        for value in [float(mean + rng.standard_normal())]
    )
    write_scores(root, scenes_scores(root, images, metric="clip-score", notes=()))
    return root


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
