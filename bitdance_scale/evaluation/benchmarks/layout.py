"""Which files of a folder show the images of a prompt to the scorer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from bitdance_scale.evaluation.benchmarks.picture import Picture
from bitdance_scale.evaluation.benchmarks.prompt import Prompt

VERSION = 1
"""Of all layouts; raised when a folder of an earlier one cannot be drawn on."""
PARTS = "parts"
"""Folder of single images that wait for the others of their picture."""


class Layout(ABC):
    """Where pictures lie; paths are relative to the folder of a drawing.

    Attributes:
        array: the one file that all images become, if they do; in the order of `rounds`.
        overview: a picture of some images, for people, if there is one.
        makes_files: whether a file is made of the images of a prompt, so that one process must draw them all.
    """

    array: PurePosixPath | None = None
    overview: PurePosixPath | None = None
    makes_files = True

    @abstractmethod
    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The files of a prompt that the scorer reads; those of single images first, in their order."""

    def image(self, prompt: Prompt, k: int) -> Picture:
        """Where image k of a prompt is written as soon as it is drawn."""
        return Picture(PurePosixPath(PARTS, prompt.id, f"{k:04d}.npy"))

    def copy(self, prompt: Prompt, k: int) -> Picture | None:
        """Where image k of a prompt is written once more for who asks for it; None: it has a file anyway."""
        return None

    def records(self, prompt: Prompt) -> Mapping[PurePosixPath, Mapping[str, Any]]:
        """Files of one line of JSON that the scorer reads beside the pictures."""
        return {}

    def stranger(self, path: PurePosixPath) -> str:
        """What to call a picture that belongs to no prompt, for messages."""
        return "belongs to no prompt"


class SeparatePictures(Layout):
    """A file for every image."""

    makes_files = False

    @abstractmethod
    def separate(self, prompt: Prompt, k: int) -> PurePosixPath:
        """The file of image k."""

    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The files of the images."""
        return [self.image(prompt, k) for k in range(prompt.num_images)]

    def image(self, prompt: Prompt, k: int) -> Picture:
        """The file of image k, where it stays."""
        return Picture(self.separate(prompt, k))


class OneArray(Layout):
    """All images of classes in one array with their labels; until it is made, a file for each.

    Args:
        array: the file of the array.
    """

    overview = PurePosixPath("grid.png")
    makes_files = False

    def __init__(self, array: str) -> None:
        self.array = PurePosixPath(array)

    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The files that the array is made from."""
        return [self.image(prompt, k) for k in range(prompt.num_images)]

    def copy(self, prompt: Prompt, k: int) -> Picture:
        """A PNG of image k."""
        return Picture(PurePosixPath("images", prompt.id, f"{k:04d}.png"))


def model_stranger(path: PurePosixPath, pattern: str, model: str) -> str:
    """What to call a stranger where the model's name is part of the paths.

    Args:
        path: of the stranger.
        pattern: of paths of any model, whose group is its name.
        model: the model that is drawn.
    """
    match = re.fullmatch(pattern, str(path))
    if match is None or match[1] == model:
        return "belongs to no prompt"
    return f"is of model {match[1]!r}, this drawing of {model!r}"
