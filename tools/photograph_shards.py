"""Cuts photographs that installed packages ship into tiles, and packs them as shards to train a tokenizer on.

    python tools/photograph_shards.py data/photographs

scikit-image and matplotlib ship some twenty photographs in their wheels; nothing is downloaded. OUT/train holds tiles
of sixteen of them, OUT/held_out tiles of four others. Tiles do not overlap and are PNGs in RGB; almost even ones, such
as the black around the retina, are left out. The two largest photographs are halved first, or half of all tiles would
be theirs. Equal versions of the packages give equal shards.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance_scale.data.shard_writing.pack import PackOptions, pack_source
from bitdance_scale.errors import BitDanceError, DataError

SKIMAGE, MATPLOTLIB = "skimage/data", "matplotlib/mpl-data/sample_data"

TRAINED: Mapping[str, str] = {
    "astronaut.png": SKIMAGE,
    "brick.png": SKIMAGE,
    "cell.png": SKIMAGE,
    "clock_motion.png": SKIMAGE,
    "coins.png": SKIMAGE,
    "grass.png": SKIMAGE,
    "gravel.png": SKIMAGE,
    "hubble_deep_field.jpg": SKIMAGE,
    "ihc.png": SKIMAGE,
    "moon.png": SKIMAGE,
    "motorcycle_left.png": SKIMAGE,
    "motorcycle_right.png": SKIMAGE,
    "page.png": SKIMAGE,
    "retina.jpg": SKIMAGE,
    "rocket.jpg": SKIMAGE,
    "text.png": SKIMAGE,
}
HELD_OUT: Mapping[str, str] = {
    "camera.png": SKIMAGE,
    "chelsea.png": SKIMAGE,
    "coffee.png": SKIMAGE,
    "grace_hopper.jpg": MATPLOTLIB,
}
HALVED = ("hubble_deep_field.jpg", "retina.jpg")
MIN_DEVIATION = 6.0
"""Least standard deviation of the pixels of a tile, in grey levels."""


def read_photograph(name: str, place: str) -> np.ndarray:
    """uint8 [H, W, 3], a photograph that a package ships.

    Args:
        name: of its file.
        place: `PACKAGE/FOLDER`.

    Raises:
        DataError: the package is not installed, or ships no such file.
    """
    package, _, folder = place.partition("/")
    try:
        path = importlib.resources.files(package) / folder / name
    except ModuleNotFoundError as error:
        raise DataError(
            f"{package}: not installed, and {name} is its; install the packages of constraints.txt"
        ) from error
    if not path.is_file():
        raise DataError(f"{path}: not in the installed {package}; install the version of constraints.txt")
    with path.open("rb") as file, Image.open(file) as image:
        photograph = image.convert("RGB")
    if name in HALVED:
        photograph = photograph.reduce(2)
    return np.asarray(photograph)


def tiles(photograph: np.ndarray, side_px: int) -> Iterator[np.ndarray]:
    """Disjoint squares uint8 [side_px, side_px, 3] in raster order, centred in [H, W, 3], without almost even ones."""
    height, width = photograph.shape[:2]
    top, left = height % side_px // 2, width % side_px // 2
    for row in range(top, height - side_px + 1, side_px):
        for column in range(left, width - side_px + 1, side_px):
            tile = photograph[row : row + side_px, column : column + side_px]
            if tile.std() >= MIN_DEVIATION:
                yield tile


def write_photographs(out: Path, side_px: int) -> dict[str, int]:
    """Writes OUT/train and OUT/held_out, unless they are there already; number of tiles of each.

    Raises:
        DataError: a photograph is missing; the folders hold other shards.
    """
    counts = {}
    for part, photographs in (("train", TRAINED), ("held_out", HELD_OUT)):
        with tempfile.TemporaryDirectory() as scratch:
            for name, place in photographs.items():
                for number, tile in enumerate(tiles(read_photograph(name, place), side_px)):
                    path = Path(scratch) / f"{Path(name).stem}_{number:03d}.png"
                    Image.fromarray(np.ascontiguousarray(tile)).save(path)
            counts[part] = pack_source(scratch, out / part, PackOptions())["num_packed"]
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    parser.add_argument("--side", type=int, default=96, metavar="PX", help="side of a tile (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.side < 1:
            raise DataError(f"--side {options.side}: must be 1 or more pixels")
        counts = write_photographs(options.out, options.side)
    except BitDanceError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for part, number in counts.items():
        print(f"{options.out / part}: {number} tiles of {options.side} x {options.side} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
