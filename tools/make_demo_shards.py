"""Writes the demo data set: captioned scenes as JPEGs in img2dataset's WebDataset layout.

    python tools/make_demo_shards.py OUT --images 4000 --per-shard 500 --seed 0

Every tar NNNNN.tar holds, per image, key.jpg, key.txt (the caption) and key.json, which keeps the machine-readable
`scene`. Equal arguments give equal bytes (with the same Pillow). For held-out images take another seed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from demo_scenes import make_scene, render

from bitdance_scale.atomic_files import new_folder, write_text
from bitdance_scale.errors import BitDanceError, DataError

MARKER = "dataset.json"
KIND = "bitdance demo scenes 1"


def write_shards(out: str | Path, num_images: int, per_shard: int, seed: int, is_forced: bool = False) -> bool:
    """Writes the shards of `num_images` scenes into the folder `out`, unless they are there already.

    The shards are written beside `out` and renamed when complete, with a marker `dataset.json` that states the
    arguments.

    Args:
        out: folder to make; its parents are made as well.
        num_images: images in all, at least 1.
        per_shard: images per tar, 1..10000 (keys have four digits within a shard).
        seed: seed of the scenes.
        is_forced: whether an earlier data set of other arguments is replaced.

    Returns:
        True if shards were written, False if `out` was complete for the same arguments.

    Raises:
        DataError: arguments out of range; `out` holds a data set of other arguments, or files of unknown origin.
    """
    if num_images < 1 or not 1 <= per_shard <= 10_000 or seed < 0:
        raise DataError(
            f"images {num_images}, per shard {per_shard}, seed {seed}: there must be at least 1 image, 1..10000 images "
            "per shard and a seed of 0 or more"
        )
    out = Path(out)
    arguments = {"kind": KIND, "num_images": num_images, "per_shard": per_shard, "seed": seed}
    if out.exists() and _is_complete(out, arguments, is_forced):
        return False
    with new_folder(out) as scratch:
        for shard, first in enumerate(range(0, num_images, per_shard)):
            _write_shard(scratch / f"{shard:05d}.tar", shard, range(first, min(first + per_shard, num_images)), seed)
        write_text(scratch / MARKER, json.dumps(arguments, indent=2) + "\n")
    return True


def _is_complete(out: Path, arguments: dict[str, object], is_forced: bool) -> bool:
    """Whether `out` is the wanted data set; False if it may be replaced, DataError if it may not."""
    if out.is_dir() and not any(out.iterdir()):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise DataError(
            f"{out}: exists without {MARKER}, so it is no demo data set and is left alone; name another folder"
        )
    found = json.loads(marker.read_text(encoding="utf-8"))
    if found == arguments:
        return True
    if is_forced:
        return False
    changes = ", ".join(
        f"{key} {found.get(key)!r} (wanted {arguments[key]!r})" for key in arguments if found.get(key) != arguments[key]
    )
    raise DataError(
        f"{out}: holds a demo data set of other arguments: {changes}; use --force to replace it, or another folder"
    )


def _write_shard(path: Path, shard: int, indices: Sequence[int], seed: int) -> None:
    with tarfile.open(path, "w") as tar:
        for offset, index in enumerate(indices):
            key = f"{shard:05d}{offset:04d}"
            for extension, payload in _sample_files(key, seed, index).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))


def _sample_files(key: str, seed: int, index: int) -> dict[str, bytes]:
    """Contents of one sample by extension."""
    scene = make_scene(seed, index)
    buffer = io.BytesIO()
    quality = int(np.random.default_rng([seed, index, 1]).integers(88, 97))
    render(scene).save(buffer, "JPEG", quality=quality, subsampling=0)
    jpeg = buffer.getvalue()
    width, height = scene.size_px
    record = {
        "url": f"demo-scenes/{seed}/{index}",
        "caption": scene.caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
        "scene": scene.record(),
    }
    return {"jpg": jpeg, "txt": scene.caption.encode(), "json": json.dumps(record).encode()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes captioned demo scenes as WebDataset shards.")
    parser.add_argument("out", help="folder of the shards")
    parser.add_argument("--images", type=int, default=4000, help="images in all (default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=500, help="images per tar (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a demo data set of other arguments")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        was_written = write_shards(options.out, options.images, options.per_shard, options.seed, options.force)
    except BitDanceError as error:
        print(f"make_demo_shards: {error}", file=sys.stderr)
        return 1
    if was_written:
        print(f"{options.out}: {options.images} images written in {time.monotonic() - start:.1f} s")
    else:
        print(f"{options.out}: complete already ({options.images} images, seed {options.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
