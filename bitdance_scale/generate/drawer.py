"""A trained model that draws, whatever it is loaded from: what it is asked for, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.generate.block_decode import OnBlock
from bitdance_scale.vision.tokenizer import VisionTokenizer


@dataclass(frozen=True)
class ModelFacts:
    """What those who draw have to know of a model.

    Attributes:
        name: what the page and the pictures call it.
        vision: pixels per cell, block side, and what a token is.
        sizes_px: (height, width) that it was made for; the first is offered first.
        steps: solver steps per block that it draws with unless told.
        guidance: likewise; 1 is none.
        sampler: the solver.
        num_classes: it draws from; 0: from a prompt in words.
        class_names: of all classes in order, or none.
        adapters: weight at first of each that can be added to its weights, by name.
    """

    name: str
    vision: VisionSection
    sizes_px: Sequence[tuple[int, int]]
    steps: int
    guidance: float
    sampler: str = "euler_maruyama"
    num_classes: int = 0
    class_names: Sequence[str] = ()
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def subject(self) -> str:
        """What a picture is drawn from."""
        return "Class" if self.num_classes else "Prompt"


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together.

    Attributes:
        prompts: of each: text, or a class by its number or name.
        seeds: of each, 0 .. 2^63 - 1.
        size_px: (height, width) of all.
        steps: solver steps per block.
        guidance: classifier-free guidance scale; 1 is none.
        sampler: the solver.
        adapters: weight of each adapter of the model.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    size_px: tuple[int, int]
    steps: int
    guidance: float
    sampler: str
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Drawer(Protocol):
    """Draws pictures, one batch at a time."""

    @property
    def facts(self) -> ModelFacts:
        """Of its model."""
        ...

    @property
    def vision(self) -> VisionTokenizer:
        """Decodes what it draws."""
        ...

    def draw(self, batch: Batch, on_block: OnBlock) -> torch.Tensor | np.ndarray:
        """Draws pictures together.

        Args:
            batch: what and how.
            on_block: sees every block as soon as it is drawn; what it raises ends the drawing.

        Returns:
            The tokens of each, as `vision.decode` takes them.

        Raises:
            ConfigError: the model cannot draw so.
        """
        ...
