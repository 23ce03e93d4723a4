"""Pictures of a prompt from the folder of a drawing, small, and all pictures of a page within a bound."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.report.comparison import PromptScore
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder

MAX_SIDE_PX = 192
"""Of a picture on the page; larger ones are shrunk."""
MAX_PICTURE_BYTES = 12 * 2**20
"""Of all pictures of a page; base64 makes them a third larger."""
_MAX_PNG_BYTES = 12_000
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Thumbnail:
    """A picture for the page.

    Attributes:
        content: a file.
        media_type: of the file.
    """

    content: bytes
    media_type: str


class PageFullError(Exception):
    """The pictures of a page have reached their bound."""


class Thumbnails:
    """Reads the pictures of prompts.

    Args:
        max_bytes: of all pictures that are handed out for the page.
    """

    def __init__(self, max_bytes: int = MAX_PICTURE_BYTES) -> None:
        self._left_bytes = max_bytes
        self.num_left_out = 0

    def for_page(self, folder: ScoredFolder, scores: Scores, prompt: PromptScore, max_images: int) -> list[Thumbnail]:
        """The images of a prompt that were scored, in the order of their numbers; at most so many.

        Raises:
            ConfigError: they cannot be read: a file is gone or damaged.
            PageFullError: there is no room on the page; the number of images is added to `num_left_out`.
        """
        if self._left_bytes <= 0:
            raise self._full(prompt, max_images)
        found = read_images(folder, scores, prompt)[:max_images]
        small = [Thumbnail(*encode(shrink(image))) for image in found]
        size = sum(len(one.content) for one in small)
        if size > self._left_bytes:
            self._left_bytes = 0
            raise self._full(prompt, max_images)
        self._left_bytes -= size
        return small

    def _full(self, prompt: PromptScore, max_images: int) -> PageFullError:
        self.num_left_out += min(max_images, len(prompt.images))
        return PageFullError()


def read_images(folder: ScoredFolder, scores: Scores, prompt: PromptScore) -> list[np.ndarray]:
    """The scored images of a prompt, uint8 [H, W, 3] each, in the order of their numbers.

    Raises:
        ConfigError: the folder is of no benchmark, so that its files are not known, or a file is gone or damaged.
    """
    if not folder.benchmark:
        raise ConfigError(f"{folder.root}: holds images of no benchmark, and which is of which prompt is not known")
    benchmark = find_benchmark(folder.benchmark)
    default = max(image.k for image in scores.images) + 1
    num_images = folder.drawing.get("images_per_prompt", default)
    prompts = [Prompt(name, text, "", num_images, {}) for name, text in scores.prompts.items()]
    layout = dataclasses.replace(benchmark, num_images=num_images).layout(scores.model)
    (wanted,) = (one for one in prompts if one.id == prompt.prompt_id)
    images = ImageFolder(folder.root, layout, prompts).read(wanted)
    if prompt.images[-1].k >= len(images):
        raise ConfigError(
            f"{folder.root}: image {prompt.images[-1].k} of prompt {prompt.prompt_id} was scored, and there are "
            f"{len(images)}; draw again what is missing"
        )
    return [images[image.k] for image in prompt.images]


def shrink(image: np.ndarray) -> Image.Image:
    """An image, uint8 [H, W, 3], with no side longer than `MAX_SIDE_PX`."""
    small = Image.fromarray(image)
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    return small


def encode(image: Image.Image) -> tuple[bytes, str]:
    """The bytes and the media type of a picture: without loss where that is small, otherwise JPEG."""
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    if len(content.getvalue()) <= _MAX_PNG_BYTES:
        return content.getvalue(), "image/png"
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=_JPEG_QUALITY)
    return content.getvalue(), "image/jpeg"


def contact_sheet(images: list[np.ndarray]) -> Image.Image:
    """Images of one size in a row, small."""
    small = [shrink(image) for image in images]
    sheet = Image.new("RGB", (sum(image.width for image in small), max(image.height for image in small)), "white")
    left = 0
    for image in small:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
