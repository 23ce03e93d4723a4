"""What is drawn and how: read from the fields of the page, and kept in every picture."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import bitdance_scale
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.drawer import Batch, ModelFacts
from bitdance_scale.generate.image_sizes import check_size
from bitdance_scale.text_files import is_utf8

SETTINGS_KEY = "bitdance"
"""Keyword of the text chunk of a PNG that holds the settings of the picture, as JSON in ASCII."""
MAX_SEED = 2**53 - 1
"""JavaScript's numbers hold every integer up to here."""
MAX_PROMPT_CHARACTERS = 10_000
MAX_STEPS = 1000


@dataclass(frozen=True)
class DrawSettings:
    """Pictures that are drawn together.

    Attributes:
        prompt: text, or a class by its number or name.
        height, width: in pixels.
        steps: solver steps per block.
        guidance: classifier-free guidance scale; 1 is none.
        seed: of the first picture; each further one has the next.
        images: how many.
        adapters: weight of each adapter.
    """

    prompt: str
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    images: int
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def seeds(self) -> list[int]:
        """Of each picture."""
        return [self.seed + number for number in range(self.images)]

    def batch(self, facts: ModelFacts) -> Batch:
        """What a model is asked for."""
        prompts = [self.prompt] * self.images
        return Batch(prompts, self.seeds, self.size_px, self.steps, self.guidance, facts.sampler, self.adapters)

    def record(self, facts: ModelFacts, number: int) -> dict[str, Any]:
        """What the picture of this number says of itself."""
        of_model = {"model": facts.name, "sampler": facts.sampler, "version": bitdance_scale.__version__}
        return dataclasses.asdict(self) | {"image": number} | of_model


@dataclass(frozen=True)
class Fields:
    """What stands in the fields of the page, as a browser sends it: any of them may be empty or out of range."""

    prompt: str | None
    size: str | None
    steps: float | None
    guidance: float | None
    seed: float | None
    images: float | None
    adapters: Sequence[float | None] = ()


def read_fields(fields: Fields, facts: ModelFacts, max_images: int) -> DrawSettings:
    """The settings that fields ask for.

    Args:
        fields: of the page.
        facts: of the model.
        max_images: most pictures that are drawn together.

    Raises:
        ConfigError: a field is empty or its value is not possible; says which field, and what would be.
    """
    height, width = parse_page_size(fields.size or "", facts)
    return DrawSettings(
        prompt=_prompt(fields.prompt, facts),
        height=height,
        width=width,
        steps=_whole("Steps", fields.steps, 1, MAX_STEPS),
        guidance=_number("Guidance", fields.guidance),
        seed=_whole("Seed", fields.seed, 0, MAX_SEED - max_images),
        images=_whole("Images", fields.images, 1, max_images),
        adapters={
            name: _number(f"Weight of {name}", weight)
            for name, weight in zip(facts.adapters, fields.adapters, strict=True)
        },
    )


def parse_page_size(text: str, facts: ModelFacts) -> tuple[int, int]:
    """(height, width) in pixels of a text such as "64 x 96", which the model can draw.

    Raises:
        ConfigError: it is no such text, or the model has no such size.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*", text.lower())  # noqa: RUF001
    if match is None:
        raise ConfigError(f"Size {text!r}: must be height x width in pixels, such as {shown_size(facts.sizes_px[0])}")
    size = int(match[1]), int(match[2])
    check_size(*size, facts.vision)
    return size


def shown_size(size_px: tuple[int, int]) -> str:
    """A size as the page shows it and reads it."""
    return f"{size_px[0]} x {size_px[1]}"


def png_of(image: np.ndarray, record: Mapping[str, Any]) -> bytes:
    """A PNG with its settings in a text chunk.

    Args:
        image: uint8 [H, W, 3].
        record: of the picture, from `DrawSettings.record`.
    """
    chunks = PngInfo()
    chunks.add_text(SETTINGS_KEY, json.dumps(record))
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG", pnginfo=chunks)
    return content.getvalue()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a picture was drawn with.

    Raises:
        ConfigError: it is no picture, or does not say.
    """
    try:
        with Image.open(path) as picture:
            # Text chunks may lie behind the pixels.
            picture.load()
            text = picture.info.get(SETTINGS_KEY)
        if not isinstance(text, str):
            raise ConfigError(f"{path}: does not say how it was drawn; pictures that the page has written do")
        found: dict[str, Any] = json.loads(text)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a picture with its settings ({error})") from error
    return found


def _prompt(text: str | None, facts: ModelFacts) -> str:
    prompt = (text or "").strip()
    if not prompt:
        wanted = "choose a class" if facts.num_classes else "write what the picture should show"
        raise ConfigError(f"{facts.subject} is empty: {wanted}")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ConfigError(
            f"{facts.subject} has {len(prompt):,} characters: must have at most {MAX_PROMPT_CHARACTERS:,}; shorten it"
        )
    if not is_utf8(prompt):
        raise ConfigError(f"{facts.subject} holds half of a character (a lone surrogate); write it again")
    return prompt


def _number(name: str, value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ConfigError(f"{name} is empty: must be a number")
    return float(value)


def _whole(name: str, value: float | None, least: int, most: int) -> int:
    number = _number(name, value)
    if number != int(number) or not least <= number <= most:
        raise ConfigError(f"{name} = {value:g}: must be a whole number from {least} to {most}")
    return int(number)
