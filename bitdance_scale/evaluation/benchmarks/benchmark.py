"""What every benchmark is: prompts that are read from its published file, settings, and a layout of its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from bitdance_scale.evaluation.benchmarks.layout import Layout
from bitdance_scale.evaluation.benchmarks.prompt import Prompt


@dataclass(frozen=True)
class Settings:
    """How the published scores were drawn.

    Attributes:
        size_px: (height, width).
        steps: solver steps per block.
        guidance: classifier-free guidance scale; None: it depends on the model.
        source: where this is published, or that it is assumed.
    """

    size_px: tuple[int, int]
    steps: int
    guidance: float | None
    source: str


@dataclass(frozen=True)
class Benchmark(ABC):
    """A benchmark.

    Attributes:
        num_images: images of each prompt; the published number by default.
    """

    num_images: int

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in commands and in `drawing.json`."""

    @property
    @abstractmethod
    def prompt_file(self) -> str:
        """Its published file of prompts, for messages; empty where there is none."""

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """How the published scores were drawn."""

    @abstractmethod
    def layout(self, model: str) -> Layout:
        """Where the pictures of a model lie in its folder; the model's name is part of the paths of some benchmarks.

        Raises:
            ConfigError: the name is part of the paths and cannot be, or images do not fit the layout.
        """

    @abstractmethod
    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts, in the order of their file.

        Args:
            path: the published file, or None where a benchmark needs none.

        Raises:
            ConfigError: it cannot be read or is no file of this benchmark; names the line and what is wrong with it.
        """

    def as_drawn(self, num_images: int, num_prompts: int) -> Self:
        """The benchmark of a drawing.

        Args:
            num_images: images of each prompt.
            num_prompts: prompts; it counts where a benchmark makes its prompts itself.
        """
        return replace(self, num_images=num_images)
