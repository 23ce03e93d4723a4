"""Small folders of pictures, and what is in the shards that were made of them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.unit.data.small_data import encode_image


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_folder(folder: Path, count: int = 12) -> Path:
    """Pictures of three formats in nested folders, each with a caption."""
    kinds = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    for number in range(count):
        extension, kind = kinds[number % 3]
        stem = folder / f"part {number % 2}" / f"picture {number:03d}"
        write(stem.with_suffix(f".{extension}"), encode_image(40 + number, 50, number, kind))
        write(stem.with_suffix(".txt"), f"caption {number}")
    return folder


def noise(height: int, width: int, seed: int = 0) -> bytes:
    """A JPEG that is cut easily: noise has no short code."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content of all tars directly in a folder, read by the standard library."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None and extension not in samples.get(key, {})
                samples.setdefault(key, {})[extension] = file.read()
    return samples


def records_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Original name -> record of the samples of a folder."""
    found = [json.loads(members["json"]) for members in samples_of(folder).values()]
    return {record["original_name"]: record for record in found}


def tree_digest(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def skipped_of(folder: Path) -> dict[str, str]:
    """Name -> cause of what was skipped."""
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["name"]: entry["cause"] for entry in map(json.loads, lines)}
