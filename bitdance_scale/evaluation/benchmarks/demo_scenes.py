"""Captions of the demo's scenes in GenEval's six categories, for models that were trained on such scenes.

No data set of the demo holds them. Their pictures are judged without a network (`evaluation/scenes`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

from bitdance_scale.demo.scenes import CATEGORY_SHARES, Scene, make_scene
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import SeparatePictures
from bitdance_scale.evaluation.benchmarks.prompt import Prompt

PROMPT_SEED = 2_000_000
"""Seed of the scenes whose captions are asked for; data sets use small ones."""
CATEGORIES = tuple(name for name in CATEGORY_SHARES if name != "words")
"""GenEval's."""


def choose_scenes(per_category: int) -> list[Scene]:
    """The first `per_category` scenes of every category, interleaved; always the same."""
    chosen: dict[str, list[Scene]] = {category: [] for category in CATEGORIES}
    index = 0
    while any(len(scenes) < per_category for scenes in chosen.values()):
        scene = make_scene(PROMPT_SEED, index)
        if scene.category in chosen and len(chosen[scene.category]) < per_category:
            chosen[scene.category].append(scene)
        index += 1
    return [scene for scenes in zip(*chosen.values(), strict=True) for scene in scenes]


class NumberedPictures(SeparatePictures):
    """`{number:05d}.png`, or `{number:05d}_{k}.png` for several images of a prompt."""

    def separate(self, prompt: Prompt, k: int) -> PurePosixPath:
        """The file of image k."""
        return PurePosixPath(f"{prompt.id}.png" if prompt.num_images == 1 else f"{prompt.id}_{k}.png")


@dataclass(frozen=True)
class DemoBenchmark(Benchmark):
    """A benchmark of the demo: its prompts are made here, and its pictures are numbered."""

    num_images: int = 1
    prompt_file = ""

    def layout(self, model: str) -> NumberedPictures:
        """The layout, in which no model is named."""
        if self.num_images < 1:
            raise ConfigError(f"images per prompt = {self.num_images}: must be at least 1")
        return NumberedPictures()

    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts, for which no file is read."""
        if path is not None:
            raise ConfigError(f"{path}: {self.name} draws its prompts itself and reads no file; name none")
        return self.prompts()

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """The prompts, in order of their numbers."""


@dataclass(frozen=True)
class DemoScenes(DemoBenchmark):
    """Captions of demo scenes.

    Attributes:
        per_category: prompts of each category.
    """

    per_category: int = 50
    name = "demo-scenes"
    settings = Settings((64, 64), 25, 3.0, "those that the demo's results were drawn with: docs/stages.md")

    def prompts(self) -> list[Prompt]:
        """The captions of `choose_scenes`; the record is the scene."""
        return [
            Prompt(f"{number:05d}", scene.caption, scene.category, self.num_images, scene.record())
            for number, scene in enumerate(choose_scenes(self.per_category))
        ]

    def as_drawn(self, num_images: int, num_prompts: int) -> Self:
        """The benchmark of a drawing, which has as many prompts of each category."""
        return replace(self, num_images=num_images, per_category=num_prompts // len(CATEGORIES))
