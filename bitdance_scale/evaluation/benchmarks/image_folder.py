"""The folder of a drawing: which images are there, which are to be drawn, and what does not belong there.

An image is written as soon as it is drawn, whole or not at all, so that a drawing that was stopped loses none. What the
benchmark's scorer reads is made of the images of a prompt as soon as they are all there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from bitdance_scale.atomic_files import WRITING, write_text
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.array_file import ArrayFile
from bitdance_scale.evaluation.benchmarks.layout import PARTS, Layout
from bitdance_scale.evaluation.benchmarks.picture import SUFFIXES, Picture, describe_px
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.text_files import read_utf8
from bitdance_scale.wording import first_few


@dataclass(frozen=True)
class FolderState:
    """What a folder holds of a drawing; paths are relative to it.

    Attributes:
        root: the folder.
        complete: prompts whose files are all there.
        to_draw: for each other prompt, by its id, the numbers of the images to draw; none where they are all there and
            only a file that is made of them is missing, which `ImageFolder.finish_prompt` makes.
        damaged: files that are cut short or no pictures, and what is wrong; they count as missing.
        foreign: pictures of another size, another prompt, another model or none, and which.
    """

    root: Path
    complete: tuple[Prompt, ...]
    to_draw: Mapping[str, tuple[int, ...]]
    damaged: Mapping[str, str]
    foreign: Mapping[str, str]

    @property
    def num_to_draw(self) -> int:
        """Images that are missing."""
        return sum(map(len, self.to_draw.values()))

    def refuse_foreign(self) -> None:
        """Refuses a folder with pictures of something else.

        Raises:
            ConfigError: there are some; names the first ones.
        """
        if self.foreign:
            listed = [f"{path} {reason}" for path, reason in self.foreign.items()]
            raise ConfigError(
                f"{self.root}: holds pictures that are not of this drawing: {first_few(listed)}. Move them elsewhere, "
                "or name another folder"
            )

    def require_complete(self) -> None:
        """Refuses a folder that cannot be scored.

        Raises:
            ConfigError: a prompt is not complete, or pictures are of something else; names the first ones.
        """
        self.refuse_foreign()
        if not self.to_draw:
            return
        listed = [f"prompt {prompt_id} {_lacks(numbers)}" for prompt_id, numbers in self.to_draw.items()]
        listed = [*(f"{path} {reason}" for path, reason in self.damaged.items()), *listed]
        raise ConfigError(
            f"{self.root}: {len(self.to_draw)} of {len(self.complete) + len(self.to_draw)} prompts are not complete: "
            f"{first_few(listed)}. Run the drawing again with the same settings; it goes on with what is missing"
        )


class ImageFolder:
    """The pictures of a drawing.

    Args:
        root: the folder.
        layout: of the benchmark.
        prompts: in the order of the benchmark.
        size_px: (height, width) of an image. None: that of the first picture that is there, for folders that another
            program has drawn.
    """

    def __init__(
        self, root: Path, layout: Layout, prompts: Sequence[Prompt], size_px: tuple[int, int] | None = None
    ) -> None:
        self._root, self._layout, self._prompts = root, layout, prompts
        self._size_px = None if size_px is None else (size_px[0], size_px[1])
        self._array = None if layout.array is None else ArrayFile(root / layout.array, prompts)

    def state(self) -> FolderState:
        """What the folder holds. Pictures are measured, not decoded; one process may ask for all.

        Raises:
            ConfigError: there is no such folder.
        """
        if not self._root.is_dir():
            raise ConfigError(f"{self._root}: no such folder; draw the images first")
        found = set(_files(self._root))
        damaged: dict[str, str] = {}
        foreign: dict[str, str] = {}
        complete, to_draw = [], {}
        known: set[PurePosixPath] = set()
        has_array = self._has_array(found, damaged, foreign)
        for prompt in self._prompts:
            images = [self._layout.image(prompt, k) for k in range(prompt.num_images)]
            pictures = self._layout.pictures(prompt)
            copies = [copy for k in range(prompt.num_images) if (copy := self._layout.copy(prompt, k)) is not None]
            known |= {picture.path for picture in (*images, *pictures, *copies)}
            if has_array:
                complete.append(prompt)
                continue
            either = dict.fromkeys((*images, *pictures))
            good = {picture.path for picture in either if self._is_good(picture, found, damaged, foreign)}
            has_records = self._has_records(prompt, found, foreign)
            if has_records and all(picture.path in good for picture in pictures):
                complete.append(prompt)
            else:
                to_draw[prompt.id] = _needed(images, pictures, good)
        known |= {path for path in (self._layout.array, self._layout.overview) if path is not None}
        for path in sorted(found - known):
            if path.suffix.lower() in SUFFIXES:
                foreign[str(path)] = self._layout.stranger(path)
        return FolderState(self._root, tuple(complete), to_draw, damaged, foreign)

    def write_image(self, prompt: Prompt, k: int, image: np.ndarray) -> None:
        """Writes image k of a prompt, uint8 [H, W, 3], and, if it is the last one missing, what is made of them all.

        Several processes may write to a folder if each has images of its own, and prompts of its own where files are
        made of their images (`Layout.makes_files`).

        Raises:
            ValueError: the image has another type or size.
        """
        self._check([image])
        self._write_single(self._layout.image(prompt, k), image)
        if not self._layout.makes_files:
            return
        singles = [self._layout.image(prompt, other) for other in range(prompt.num_images)]
        if all(single.is_there(self._root, image.shape[:2]) for single in singles):
            self.finish_prompt(prompt)

    def write(self, prompt: Prompt, images: Sequence[np.ndarray]) -> None:
        """Writes all images of a prompt, uint8 [H, W, 3] each, as the scorer reads them.

        Raises:
            ValueError: there are more or fewer than the prompt has, or one has another type or size.
        """
        if len(images) != prompt.num_images:
            raise ValueError(f"prompt {prompt.id}: {len(images)} images, expected {prompt.num_images}")
        self._check(images)
        lasting = self._layout.pictures(prompt)
        for k, image in enumerate(images):
            if self._layout.image(prompt, k) in lasting:
                self._write_single(self._layout.image(prompt, k), image)
        self._assemble(prompt, images)

    def finish_prompt(self, prompt: Prompt) -> None:
        """Makes what the scorer reads of the images of a prompt, which are all there; parts are removed.

        Raises:
            ConfigError: an image cannot be read.
        """
        singles = [self._layout.image(prompt, k) for k in range(prompt.num_images)]
        self._assemble(prompt, [single.read(self._root)[0] for single in singles])
        lasting = self._layout.pictures(prompt)
        for single in singles:
            if single not in lasting:
                (self._root / single.path).unlink()

    def finish(self) -> None:
        """Makes what a stopped process left to be made of images, and the one array of them all; parts are removed.

        Called by one process; the images of one prompt at a time are in memory.

        Raises:
            ConfigError: the folder is not complete, or an image cannot be read.
        """
        state = self.state()
        unmade = [prompt for prompt in self._prompts if state.to_draw.get(prompt.id) == ()]
        if unmade:
            state.refuse_foreign()
            for prompt in unmade:
                self.finish_prompt(prompt)
            state = self.state()
        state.require_complete()
        if self._array is not None and (str(self._layout.array) in state.damaged or not self._array.path.exists()):
            self._array.write(self._single)
        shutil.rmtree(self._root / PARTS, ignore_errors=True)

    def write_copies(self, process: int = 0, num_processes: int = 1) -> None:
        """Writes every image of a finished array as a file too, where it is not there.

        Args:
            process: number of this process among those that share out the images.
            num_processes: how many they are.
        """
        if self._array is None:
            return
        for prompt, k, image in self._array.images(process, num_processes):
            copy = self._layout.copy(prompt, k)
            if copy is not None and not copy.is_there(self._root, image.shape[:2]):
                copy.write(self._root, [image], is_durable=False)

    def read(self, prompt: Prompt) -> list[np.ndarray]:
        """The images of a complete prompt, uint8 [H, W, 3] each; those of a grid are cut out of it.

        Raises:
            ConfigError: a file is missing, cannot be read, or has another number or size of images.
        """
        array = self._array
        images = self._images(prompt) if array is None or not array.path.exists() else array.read(prompt)
        sizes = {image.shape[:2] for image in images}
        if len(images) != prompt.num_images or len(sizes) != 1 or (self._size_px and sizes != {self._size_px}):
            expected = "one size" if self._size_px is None else describe_px(self._size_px)
            raise ConfigError(
                f"{self._root}: prompt {prompt.id} has {len(images)} images of "
                f"{', '.join(map(describe_px, sorted(sizes)))}, expected {prompt.num_images} of {expected}; remove its "
                "files and draw it again"
            )
        return images

    def _images(self, prompt: Prompt) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for picture in self._layout.pictures(prompt):
            if len(found) < prompt.num_images:
                found += picture.read(self._root)
        return found

    def _single(self, prompt: Prompt, k: int) -> np.ndarray:
        return self._layout.image(prompt, k).read(self._root)[0]

    def _has_array(self, found: set[PurePosixPath], damaged: dict[str, str], foreign: dict[str, str]) -> bool:
        """Whether the one array is there and whole; what is wrong with it otherwise."""
        if self._array is None or self._layout.array not in found:
            return False
        name = str(self._layout.array)
        try:
            reason = self._array.stranger(self._size_px)
        except (OSError, ValueError) as error:
            damaged[name] = str(error)
            return False
        if reason:
            foreign[name] = reason
        return not reason

    def _is_good(
        self, picture: Picture, found: set[PurePosixPath], damaged: dict[str, str], foreign: dict[str, str]
    ) -> bool:
        """Whether a picture is there, whole and of the right size; what is wrong otherwise goes into the lists."""
        if picture.path not in found:
            return False
        measured = picture.measure(self._root)
        if isinstance(measured, str):
            damaged[str(picture.path)] = measured
            return False
        if self._size_px is None:
            self._size_px = (measured[0] // picture.side, measured[1] // picture.side)
        expected = picture.size_px(self._size_px)
        if measured != expected:
            foreign[str(picture.path)] = f"is {describe_px(measured)}, expected {describe_px(expected)}"
            return False
        return True

    def _has_records(self, prompt: Prompt, found: set[PurePosixPath], foreign: dict[str, str]) -> bool:
        """Whether the lines beside the pictures are there; those of another prompt are foreign."""
        has_all = True
        for path, record in self._layout.records(prompt).items():
            if path not in found:
                has_all = False
                continue
            try:
                is_same = json.loads(read_utf8(self._root / path)) == record
            except (OSError, ValueError):
                is_same = False
            if not is_same:
                foreign[str(path)] = "holds another line than the file of prompts"
                has_all = False
        return has_all

    def _check(self, images: Sequence[np.ndarray]) -> None:
        expected = (*(self._size_px or images[0].shape[:2]), 3)
        for image in images:
            if image.dtype != np.uint8 or image.shape != expected:
                raise ValueError(f"an image of {image.dtype} {list(image.shape)}, expected uint8 {list(expected)}")

    def _write_single(self, single: Picture, image: np.ndarray) -> None:
        # A part that a crash of the machine has cut short is found, and drawn again.
        single.write(self._root, [image], is_durable=single.path.parts[0] != PARTS)

    def _assemble(self, prompt: Prompt, images: Sequence[np.ndarray]) -> None:
        """Writes what is made of the images of a prompt."""
        for path, record in self._layout.records(prompt).items():
            # ASCII, as scorers read it in whatever encoding their locale has.
            write_text(self._root / path, json.dumps(dict(record)) + "\n")
        singles = [self._layout.image(prompt, k) for k in range(prompt.num_images)]
        for picture in self._layout.pictures(prompt):
            if picture not in singles:
                picture.write(self._root, images)


def _needed(images: Sequence[Picture], pictures: Sequence[Picture], good: set[PurePosixPath]) -> tuple[int, ...]:
    """The images to draw; none where the picture that is made of them is good."""
    made = [picture for picture in pictures if picture not in images]
    if len(made) == len(pictures) and all(picture.path in good for picture in made):
        return ()
    return tuple(k for k, image in enumerate(images) if image.path not in good)


def _lacks(numbers: Sequence[int]) -> str:
    return f"lacks image {', '.join(map(str, numbers))}" if numbers else "lacks a file that is made of its images"


def _files(root: Path) -> Iterator[PurePosixPath]:
    """Files below a folder, without those that a stopped process was writing.

    A stopped process may leave some; the next one writes over them.
    """
    for folder, _, names in os.walk(root):
        below = Path(folder).relative_to(root)
        yield from (PurePosixPath(below / name) for name in names if not name.endswith(WRITING))
