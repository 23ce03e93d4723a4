"""The one array that all images of a drawing become, in rounds over all classes, with the class of each as label."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bitdance_scale.atomic_files import replacing
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.picture import describe_px
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, rounds
from bitdance_scale.evaluation.image_array import map_npz, read_labels, write_npz


class ArrayFile:
    """An `.npz` with the images of all prompts as `arr_0`, in the order of `rounds`, and their classes as `arr_1`.

    Args:
        path: the file.
        prompts: of the benchmark; their texts are the numbers of classes.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt]) -> None:
        self.path, self._prompts = path, prompts

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 [N]."""
        return np.array([int(self._prompts[n].text) for n, _ in rounds(self._prompts)], np.int64)

    def write(self, read: Callable[[Prompt, int], np.ndarray]) -> None:
        """Writes it, whole or not at all, one image in memory.

        Args:
            read: image k of a prompt, uint8 [H, W, 3].
        """
        places = rounds(self._prompts)
        shape = (len(places), *read(self._prompts[0], 0).shape)
        with replacing(self.path) as aside:
            write_npz(aside, shape, (read(self._prompts[n], k)[None] for n, k in places), self.labels)

    def stranger(self, size_px: tuple[int, int] | None) -> str:
        """What shows that it is of another drawing; empty if nothing does.

        Args:
            size_px: (height, width) that its images should have; None: any.

        Raises:
            OSError: of the file system.
            ValueError: it is damaged.
        """
        shape = map_npz(self.path).shape
        if shape[0] != len(self.labels) or (size_px is not None and shape[1:3] != size_px):
            expected = "" if size_px is None else f" of {describe_px(size_px)}"
            return f"has {shape[0]} images of {describe_px(shape[1:])}, expected {len(self.labels)}{expected}"
        if not np.array_equal(read_labels(self.path), self.labels):
            return "has the images of its classes (arr_1) in another order"
        return ""

    def read(self, prompt: Prompt) -> list[np.ndarray]:
        """The images of a prompt, uint8 [H, W, 3] each; the labels in the file say which they are.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            images = map_npz(self.path)
            return [np.array(images[row]) for row in np.flatnonzero(read_labels(self.path) == int(prompt.text))]
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{self.path}: {error}; remove it and draw again") from error

    def images(self, first: int, step: int) -> Iterator[tuple[Prompt, int, np.ndarray]]:
        """(prompt, k, image uint8 [H, W, 3]) of every `step`-th image from number `first` on; the file is whole."""
        images, places = map_npz(self.path), rounds(self._prompts)
        for row in range(first, len(places), step):
            n, k = places[row]
            yield self._prompts[n], k, np.array(images[row])
