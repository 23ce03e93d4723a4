"""What every benchmark is: prompts that are read from its published file, settings, and a layout of its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from bitdance_scale.evaluation.benchmarks.layout import Layout
from bitdance_scale.evaluation.benchmarks.prompt import Prompt


@dataclass(frozen=True)
class Settings:
    """How the published scores were drawn; None: as the model's own configuration says in `[sample]`.

    Attributes:
        size_px: (height, width).
        steps: solver steps per block.
        guidance: classifier-free guidance scale.
        source: where this is published, or that it is assumed.
        sampler: euler_maruyama or euler.
        guidance_growth: constant, or linear over the blocks of an image.
        weights: of a run: trained or averaged.
        batch_size: images that are drawn together unless something else is asked for.
    """

    size_px: tuple[int, int] | None
    steps: int | None
    guidance: float | None
    source: str
    sampler: str | None = "euler_maruyama"
    guidance_growth: str | None = "constant"
    weights: str | None = "trained"
    batch_size: int = 8


@dataclass(frozen=True)
class Benchmark(ABC):
    """A benchmark.

    Attributes:
        num_images: images of each prompt; the published number by default.
        condition: what its images are drawn from, as `Family.condition`: text or class.
    """

    num_images: int
    condition: ClassVar[str] = "text"

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

    def of_model(self, num_classes: int, class_names: Sequence[str]) -> Benchmark:
        """The benchmark as it is for a model with these classes; one of texts is the same for all.

        Args:
            num_classes: of the model; 0 if it has none.
            class_names: in order of their numbers; empty if they have none.
        """
        return self

    def doubt(self, prompts: Sequence[Prompt], guidance: float) -> str:
        """What to warn of before prompts are drawn with a guidance; empty if nothing."""
        return ""

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
