"""Images of a benchmark that somebody drew before: which file is whose, their pixels, the tiles of a grid."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def images_by_name(folder: Path) -> dict[str, Path]:
    """Image files of a folder by their names up to the first dot; other files are passed over.

    Raises:
        DataError: there is no such folder, or two files have one name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of images; draw them first, or name their folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        name = path.name.split(".", 1)[0]
        if name in found:
            raise DataError(f"{folder}: {found[name].name} and {path.name} are both images of {name}; keep one")
        found[name] = path
    return found


def match_images(folder: Path, names: Collection[str], questions: str) -> dict[str, Path]:
    """The image of each name, in the order of `names`.

    Args:
        folder: the images.
        names: what images are expected of.
        questions: where the questions are from, for messages.

    Raises:
        DataError: a name without an image, or an image without a name; names the first of them.
    """
    found = images_by_name(folder)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{folder}: no images of {len(missing)} of the {len(names)} ids in {questions} ({first_few(missing)}); "
            f"draw them as {missing[0]}{SUFFIXES[0]}"
        )
    unknown = sorted(found.keys() - set(names))
    if unknown:
        raise DataError(
            f"{folder}: {len(unknown)} images have no questions in {questions} "
            f"({first_few([found[name].name for name in unknown])}); name the folder and the questions of one benchmark"
        )
    return {name: found[name] for name in names}


def read_rgb(path: Path) -> np.ndarray:
    """uint8 [H, W, 3].

    Raises:
        DataError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); draw it again") from error


def grid_tiles(grid: np.ndarray, path: Path) -> list[np.ndarray]:
    """The four images of a 2 x 2 grid without padding, row by row: uint8 [H, W, 3] each.

    Args:
        grid: uint8 [2 H, 2 W, 3].
        path: its file, for messages.

    Raises:
        DataError: a side is odd, so that it is no such grid.
    """
    height, width = grid.shape[0] // 2, grid.shape[1] // 2
    if not height or not width or grid.shape[:2] != (2 * height, 2 * width):
        raise DataError(
            f"{path}: has {grid.shape[1]} x {grid.shape[0]} pixels, which is no grid of 2 x 2 images of one size "
            "without padding; lay the four images of a prompt out so"
        )
    return [
        np.ascontiguousarray(grid[top : top + height, left : left + width])
        for top in (0, height)
        for left in (0, width)
    ]
