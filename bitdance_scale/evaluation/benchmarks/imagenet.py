"""Images of ImageNet's classes, as ADM's evaluation suite reads them (Dhariwal and Nichol, arXiv 2105.05233).

Checked against openai/guided-diffusion: evaluations/README.md. Tables 2, 3 and 12 to 14 are of 50 images of each class
at 256 px. `bitdance draw` draws them with a class-conditional run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from bitdance_scale.config.class_map import read_class_map
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import OneArray
from bitdance_scale.evaluation.benchmarks.prompt import Prompt

SAMPLES_NAME = "samples.npz"


@dataclass(frozen=True)
class ImageNet(Benchmark):
    """Images of classes. A prompt's id is the number of its class with leading zeros, its text without them.

    Attributes:
        num_classes: of the model.
    """

    num_images: int = 50
    num_classes: int = 1000
    name = "imagenet"
    prompt_file = "the class map of the run, or none for numbers alone"
    settings = Settings((256, 256), 100, None, "published with each model: the shipped configurations imagenet_*")

    def layout(self, model: str) -> OneArray:
        """The layout, in which no model is named: `samples.npz` with the images in the order of the prompts."""
        if self.num_images < 1:
            raise ConfigError(f"images per prompt = {self.num_images}: must be at least 1")
        return OneArray(SAMPLES_NAME)

    def read(self, path: Path | None) -> list[Prompt]:
        """A prompt for each class, with its name as category if there is a class map."""
        names = tuple(map(str, range(self.num_classes))) if path is None else read_class_map(path).names
        if len(names) != self.num_classes:
            raise ConfigError(
                f"{path}: names {len(names)} classes, expected {self.num_classes}; name {self.prompt_file}"
            )
        return [
            Prompt(f"{number:05d}", str(number), name, self.num_images, {"label": number, "name": name})
            for number, name in enumerate(names)
        ]

    def as_drawn(self, num_images: int, num_prompts: int) -> Self:
        """The benchmark of a drawing, which has a prompt of each class."""
        return replace(self, num_images=num_images, num_classes=num_prompts)
