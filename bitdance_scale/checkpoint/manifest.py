"""The manifest of a checkpoint: every file, its size and, but for the tensors, its SHA-256.

The digests of tensor files are in the index beside them, taken by the ranks that wrote them; the manifest has that of
the index. It has a digest of its own list too: a damaged manifest must not accuse the files it names.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.digest import file_digest, find_change, text_digest

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
_TENSOR_SUFFIX = ".safetensors"


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in `folder`, and forces it to storage."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    content = {"version": MANIFEST_VERSION, "files_sha256": _list_digest(files), "files": files}
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, naming the first file that is missing or not what was written.

    Of tensor files only the sizes are compared here; the ranks hash them when they load.
    """
    manifest = folder / MANIFEST_NAME
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        # The first version did not say which it was.
        version = content.get("version", 1)
        if version != MANIFEST_VERSION:
            fix = f"this program reads {MANIFEST_VERSION}: use the one that wrote it"
            return f"{manifest} is of version {version}, {fix}"
        if content["files_sha256"] != _list_digest(content["files"]):
            return f"{manifest} is damaged: the SHA-256 of its list is not that of what was written"
        files = [(_inside(folder, name), entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()]
    except FileNotFoundError:
        return f"{manifest} is missing" if folder.is_dir() else "there is no such checkpoint"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{manifest} is damaged ({type(error).__name__}: {error})"
    changes = (find_change(*file) for file in files)
    return next((change for change in changes if change is not None), None)


def _inside(folder: Path, name: str) -> Path:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"file {name!r} lies outside the checkpoint")
    return folder / name


def _describe(path: Path) -> dict[str, Any]:
    sha256 = None if path.suffix == _TENSOR_SUFFIX else file_digest(path)
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _list_digest(files: dict[str, Any]) -> str:
    return text_digest(json.dumps(files, sort_keys=True))
