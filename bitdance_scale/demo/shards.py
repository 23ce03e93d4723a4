"""Writes demo data sets: captioned scenes as JPEGs in img2dataset's WebDataset layout.

Every tar NNNNN.tar holds, per image, key.jpg, key.txt (the caption) and key.json, which keeps the machine-readable
`scene`. Class scenes also have key.cls, the number of the class, whose name is in classes.txt. A plain folder has
key.jpg and key.txt of every image, as people keep pictures. Equal arguments give equal bytes (with the same Pillow).
Held-out images come from another seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.atomic_files import new_folder, write_bytes, write_text
from bitdance_scale.errors import DataError

STYLES = ("corners",)
"""What `styles.py` draws; named here, as that file imports numpy."""
MIX_NAMES = ("scenes", "objects", "compositions")
"""The keys of `scenes.MIXES`; named here for the same reason."""
DEFAULT_IMAGES = 4000


@dataclass(frozen=True)
class ShippedSet:
    """A data set of a configuration that comes with the package."""

    num_images: int
    seed: int
    mix: str = "scenes"


SHIPPED_SETS: Mapping[str, ShippedSet] = {
    "data/demo": ShippedSet(8000, 0, "objects"),
    "data/demo_scenes": ShippedSet(8000, 1, "compositions"),
    "data/demo_held_out": ShippedSet(200, 1000),
    "data/demo_classes": ShippedSet(9600, 0),
    "data/demo_classes_held_out": ShippedSet(480, 1000),
    "data/tokenizer": ShippedSet(12000, 100),
    "data/tokenizer_held_out": ShippedSet(512, 101),
}
"""Folder -> what is in it."""
CLASS_SETS = ("data/demo_classes", "data/demo_classes_held_out")
"""Those of them that are class scenes."""

MARKER = "dataset.json"
CLASSES_FILE = "classes.txt"
KIND, CLASS_KIND, FOLDER_KIND = "bitdance demo scenes 1", "bitdance demo classes 1", "bitdance demo pictures 1"


def check_shipped_sets(folders: Iterable[str]) -> None:
    """Refuses a run whose data sets are the demo's and have not been drawn yet; says how to draw them.

    Args:
        folders: what the run names as its shards; those that are not in `SHIPPED_SETS` are left to others.

    Raises:
        DataError: a folder of the demo does not exist.
    """
    absent = [folder for folder in folders if folder in SHIPPED_SETS and not Path(folder).exists()]
    if absent:
        raise DataError(
            f"{absent[0]}: no such folder in {Path.cwd()}. The images of the demo are drawn by a program: "
            f"bitdance demo-data {' '.join(absent)}"
        )


def write_shards(
    out: str | Path,
    num_images: int,
    per_shard: int,
    seed: int,
    is_forced: bool = False,
    has_classes: bool = False,
    style: str = "",
    mix: str = "scenes",
) -> bool:
    """Writes the shards of `num_images` scenes into the folder `out`, unless they are there already.

    The shards are written beside `out` and renamed when complete, with a marker `dataset.json` that states the
    arguments.

    Args:
        out: folder to make; its parents are made as well.
        num_images: images in all, at least 1.
        per_shard: images per tar, 1..10000 (keys have four digits within a shard).
        seed: seed of the scenes.
        is_forced: whether an earlier data set of other arguments is replaced.
        has_classes: whether the scenes are class scenes.
        style: one of `STYLES`; empty: none.
        mix: one of `MIX_NAMES`, what the scenes are made of; class scenes have none.

    Returns:
        True if shards were written, False if `out` was complete for the same arguments.

    Raises:
        DataError: arguments out of range; `out` holds a data set of other arguments, or files of unknown origin.
    """
    _check_numbers(num_images, per_shard, seed)
    source = _Source(seed, has_classes, style, mix)
    kind = CLASS_KIND if has_classes else KIND
    arguments = {"kind": kind, "num_images": num_images, "per_shard": per_shard} | source.arguments()

    def write(scratch: Path) -> None:
        for shard, first in enumerate(range(0, num_images, per_shard)):
            indices = range(first, min(first + per_shard, num_images))
            _write_shard(scratch / f"{shard:05d}.tar", shard, indices, source)
        if has_classes:
            # Imported late, as below.
            from bitdance_scale.demo.scenes import class_names

            write_text(scratch / CLASSES_FILE, "".join(f"{name}\n" for name in class_names()))

    return _write_unless_complete(Path(out), arguments, is_forced, write)


def write_folder(
    out: str | Path, num_images: int, seed: int, is_forced: bool = False, style: str = "", mix: str = "scenes"
) -> bool:
    """Writes `num_images` scenes as NNNNN.jpg with their captions as NNNNN.txt, unless they are there already.

    The rest is as of `write_shards`.
    """
    _check_numbers(num_images, 1, seed)
    source = _Source(seed, False, style, mix)
    arguments = {"kind": FOLDER_KIND, "num_images": num_images} | source.arguments()

    def write(scratch: Path) -> None:
        for index in range(num_images):
            files = _sample_files(f"{index:05d}", index, source)
            for extension in ("jpg", "txt"):
                write_bytes(scratch / f"{index:05d}.{extension}", files[extension])

    return _write_unless_complete(Path(out), arguments, is_forced, write)


@dataclass(frozen=True)
class _Source:
    """What decides a sample beside its index."""

    seed: int
    has_classes: bool
    style: str
    mix: str

    def arguments(self) -> dict[str, object]:
        """What a marker states; nothing of a style that is not there, nor of the usual mix.

        Another mix is stated with what it is made of, so that a set of an earlier version is not taken for one of this.
        """
        # Imported late, as below.
        from bitdance_scale.demo.scenes import MIXES

        marks: dict[str, object] = {"seed": self.seed}
        if self.style:
            marks["style"] = self.style
        if self.mix != "scenes":
            made_of = json.dumps(dataclasses.asdict(MIXES[self.mix]), sort_keys=True)
            marks |= {"mix": self.mix, "mix_sha256": hashlib.sha256(made_of.encode()).hexdigest()}
        return marks


def _check_numbers(num_images: int, per_shard: int, seed: int) -> None:
    if num_images < 1 or not 1 <= per_shard <= 10_000 or seed < 0:
        raise DataError(
            f"images {num_images}, per shard {per_shard}, seed {seed}: there must be at least 1 image, 1..10000 images "
            "per shard and a seed of 0 or more"
        )


def _write_unless_complete(
    out: Path, arguments: dict[str, object], is_forced: bool, write: Callable[[Path], None]
) -> bool:
    if out.exists() and _is_complete(out, arguments, is_forced):
        return False
    with new_folder(out) as scratch:
        write(scratch)
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
        f"{key} {found.get(key)!r} (wanted {arguments.get(key)!r})"
        for key in dict.fromkeys((*arguments, *found))
        if found.get(key) != arguments.get(key)
    )
    raise DataError(
        f"{out}: holds a demo data set of other arguments: {changes}; replace it with --force, or name another folder"
    )


def _write_shard(path: Path, shard: int, indices: Sequence[int], source: _Source) -> None:
    with tarfile.open(path, "w") as tar:
        for offset, index in enumerate(indices):
            key = f"{shard:05d}{offset:04d}"
            for extension, payload in _sample_files(key, index, source).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))


def _sample_files(key: str, index: int, source: _Source) -> dict[str, bytes]:
    """Contents of one sample by extension."""
    # Imported late: drawing needs numpy, Pillow and a font of matplotlib, the check of a run does not.
    import numpy as np

    from bitdance_scale.demo.scenes import class_names, class_scene, make_scene, render
    from bitdance_scale.demo.styles import styled

    seed = source.seed
    scene = class_scene(seed, index) if source.has_classes else make_scene(seed, index, source.mix)
    buffer = io.BytesIO()
    quality = int(np.random.default_rng([seed, index, 1]).integers(88, 97))
    image = render(scene)
    if source.style:
        image = styled(image, source.style)
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
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
    } | ({"style": source.style} if source.style else {})
    files = {"jpg": jpeg, "txt": scene.caption.encode(), "json": json.dumps(record).encode()}
    return files | {"cls": str(index % len(class_names())).encode()} if source.has_classes else files
