"""One picture file: of one image, or of several in rows without a gap, as benchmarks call a grid.

An image that waits for others is a `.npy`: a PNG of 256 px takes 27 ms to write, and some models draw it in less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from bitdance_scale.atomic_files import replacing
from bitdance_scale.errors import ConfigError

SUFFIXES = frozenset({".png", ".webp", ".jpg", ".jpeg", ".npz", ".npy"})
"""What files of images are called; other files in a folder are somebody's notes or scores."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FORMATS = {".png": "PNG", ".webp": "WEBP"}
_ARRAY = ".npy"


@dataclass(frozen=True)
class Picture:
    """A picture file of a folder.

    Attributes:
        path: relative to the folder. `.png` and `.npy` (the array) are without loss; `.webp` has the quality that
            Pillow gives by default, lossy 80, as OneIG's published script writes it.
        side: images in a row, and rows.
    """

    path: PurePosixPath
    side: int = 1

    def size_px(self, image_px: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the picture of images of a size."""
        return image_px[0] * self.side, image_px[1] * self.side

    def write(self, root: Path, images: Sequence[np.ndarray], *, is_durable: bool = True) -> None:
        """Writes it, whole or not at all.

        Args:
            root: the folder.
            images: uint8 [H, W, 3] each, side * side of them, row by row.
            is_durable: whether the bytes are forced to storage.
        """
        rows = [np.concatenate(images[start : start + self.side], axis=1) for start in range(0, len(images), self.side)]
        with replacing(root / self.path, is_durable=is_durable) as aside:
            if self.path.suffix == _ARRAY:
                with aside.open("wb") as file:
                    np.save(file, np.concatenate(rows), allow_pickle=False)
            else:
                Image.fromarray(np.concatenate(rows)).save(aside, format=_FORMATS[self.path.suffix])

    def read(self, root: Path) -> list[np.ndarray]:
        """Its images, uint8 [H, W, 3] each, row by row.

        Raises:
            ConfigError: it cannot be read, or its sides do not divide by `side`.
        """
        path = root / self.path
        try:
            if path.suffix == _ARRAY:
                pixels = np.array(_map_array(path))
            else:
                with Image.open(path) as opened:
                    pixels = np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path}: cannot be read as a picture ({error}); remove it and draw it again") from error
        if any(length % self.side for length in pixels.shape[:2]):
            raise ConfigError(
                f"{path}: is {describe_px(pixels.shape[:2])}, which is no grid of {self.side} x {self.side} images; "
                "remove it and draw it again"
            )
        height, width = (length // self.side for length in pixels.shape[:2])
        return [
            np.ascontiguousarray(pixels[top : top + height, left : left + width])
            for top in range(0, pixels.shape[0], height)
            for left in range(0, pixels.shape[1], width)
        ]

    def is_there(self, root: Path, image_px: tuple[int, int]) -> bool:
        """Whether the file is there, whole and of images of this size."""
        try:
            return self.measure(root) == self.size_px(image_px)
        except FileNotFoundError:
            return False

    def measure(self, root: Path) -> tuple[int, int] | str:
        """(height, width) of the file, without decoding it; or what is wrong with it.

        Raises:
            FileNotFoundError: there is none.
        """
        path = root / self.path
        try:
            if path.suffix == _ARRAY:
                height, width, _ = _map_array(path).shape
            else:
                with Image.open(path) as opened:
                    width, height = opened.size
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return f"is no picture ({error})"
        return (height, width) if _has_its_end(path) else "is cut short"


def grid_side(benchmark: str, num_images: int) -> int:
    """Rows of a square grid.

    Raises:
        ConfigError: the images make none.
    """
    side = math.isqrt(num_images)
    if num_images < 1 or side * side != num_images:
        raise ConfigError(
            f"images per prompt = {num_images}: {benchmark} wants a square grid of them; choose 1, 4 or 9"
        )
    return side


def describe_px(size_px: Sequence[int]) -> str:
    """A size in messages."""
    return f"{size_px[0]} x {size_px[1]} px"


def _map_array(path: Path) -> np.ndarray:
    """The array of a file, which must be all there."""
    pixels: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, 3]")
    return pixels


def _has_its_end(path: Path) -> bool:
    with path.open("rb") as file:
        if path.suffix == ".webp":
            # The first chunk says how long all is, without the eight bytes that say so.
            return int.from_bytes(file.read(8)[4:], "little") + 8 <= path.stat().st_size
        file.seek(-min(len(_PNG_END), path.stat().st_size), 2)
        return path.suffix != ".png" or file.read() == _PNG_END
