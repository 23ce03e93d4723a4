"""Images of ImageNet's classes, as ADM's evaluation suite reads them (Dhariwal and Nichol, arXiv 2105.05233).

Checked against openai/guided-diffusion: evaluations/README.md and evaluator.py, which reads `arr_0` alone, and
scripts/classifier_sample.py, which writes the classes as `arr_1`. Tables 2, 3 and 12 to 14 are of 50 images of each
class at 256 px. Class-conditional models of other data have another number of classes, and are drawn in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        class_names: of the model, in order of their numbers; none for numbers alone.
    """

    num_images: int = 50
    num_classes: int = 1000
    class_names: tuple[str, ...] = ()
    name = "imagenet"
    condition = "class"
    prompt_file = "a class map with as many names as the model has classes, or none for its own names"
    settings = Settings(
        None,
        None,
        None,
        "published with each model: [sample] of the shipped configurations imagenet_*",
        sampler=None,
        guidance_growth=None,
        weights=None,
        batch_size=64,
    )

    def of_model(self, num_classes: int, class_names: Sequence[str]) -> ImageNet:
        """The benchmark with the classes of a model."""
        return replace(self, num_classes=num_classes, class_names=tuple(class_names))

    def layout(self, model: str) -> OneArray:
        """The layout, in which no model is named: `samples.npz` with the images in rounds over the classes."""
        if self.num_images < 1:
            raise ConfigError(f"images per prompt = {self.num_images}: must be at least 1")
        return OneArray(SAMPLES_NAME)

    def read(self, path: Path | None) -> list[Prompt]:
        """A prompt for each class, with its name as category if the model or a class map has one."""
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        if path is not None:
            names = read_class_map(path).names
        if len(names) != self.num_classes:
            raise ConfigError(
                f"{path}: names {len(names)} classes, and the model has {self.num_classes}; name {self.prompt_file}"
            )
        return [
            Prompt(f"{number:05d}", str(number), name, self.num_images, {"label": number})
            for number, name in enumerate(names)
        ]

    def as_drawn(self, num_images: int, num_prompts: int) -> Self:
        """The benchmark of a drawing, which has a prompt of each class."""
        return replace(self, num_images=num_images, num_classes=num_prompts)
