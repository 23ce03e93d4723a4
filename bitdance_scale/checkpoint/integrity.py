"""What the files of a checkpoint must hold, and whether they still do: SHA-256 digests and a manifest that lists them.

The manifest has every file with its size and, except for tensor files, its digest. The digests of tensor files are in
`tensors/index.json`, taken by the ranks that wrote them; the manifest has the digest of that index. It also has a
digest of its own list, so that a damaged manifest is reported as such and not as damage of the files it names.

SHA-256 because current processors have instructions for it. On them it is the fastest hash of Python's standard library
that is more than a checksum (docs/checkpoints.md has the rates).
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from bitdance_scale.atomic_files import write_text
from bitdance_scale.weight_files import HEADER_LENGTH_BYTES

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
_TENSOR_SUFFIX = ".safetensors"


def text_digest(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read through a buffer of 256 KiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU in row-major order; a view where it is contiguous."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def saved_digest(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """(size in bytes, hexadecimal SHA-256) that a safetensors file has if it holds `tensors`.

    Only the header is read back. The values are those in memory, so that an error on their way to storage is noticed
    when the file is loaded, and nothing is read twice.

    Args:
        path: the file, just written: the length of the header, the header as JSON, the values in the order of their
            offsets (https://huggingface.co/docs/safetensors).
        tensors: contiguous tensors on the CPU, by their names in the file.
    """
    with path.open("rb") as file:
        prefix = file.read(HEADER_LENGTH_BYTES)
        header = file.read(int.from_bytes(prefix, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    digest = hashlib.sha256(prefix + header)
    num_bytes = len(prefix) + len(header)
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        content = tensor_bytes(tensors[name])
        digest.update(content)
        num_bytes += content.nbytes
    return num_bytes, digest.hexdigest()


def find_change(path: Path, num_bytes: int, sha256: str | None) -> str | None:
    """What is wrong with a file that was written with this size and digest, naming it; None if nothing is.

    Args:
        path: the file.
        num_bytes: its size in bytes.
        sha256: its digest; None compares the size alone.
    """
    try:
        problem = find_irregular(path)
        if problem is not None:
            return problem
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            return f"{path} has {found_bytes} bytes, {num_bytes} were written"
        if sha256 is not None and file_digest(path) != sha256:
            return f"{path} is damaged: its SHA-256 is not that of what was written"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def find_irregular(path: Path) -> str | None:
    """Why a path is no file to read, naming it; None for a regular file.

    A checkpoint may come from someone else. A symbolic link in it could name any file of this machine, and a pipe or a
    device would be waited for.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return f"{path} is missing"
    if stat.S_ISLNK(mode):
        return f"{path} is a symbolic link, which is not followed inside a checkpoint; put the file itself there"
    return None if stat.S_ISREG(mode) else f"{path} is no regular file"


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in `folder`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    content = {"version": MANIFEST_VERSION, "files_sha256": _list_digest(files), "files": files}
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, naming the first file that is missing or changed; None if nothing is.

    Only the sizes of tensor files are compared here; the ranks hash them when they load.
    """
    manifest = folder / MANIFEST_NAME
    try:
        if (manifest.is_symlink() or manifest.exists()) and (problem := find_irregular(manifest)) is not None:
            return problem
        linked = next((path for path in folder.glob("*") if path.is_symlink()), None)
        if linked is not None:
            return find_irregular(linked)
        content = json.loads(manifest.read_text(encoding="utf-8"))
        # Version 1 did not state its version.
        version = content.get("version", 1)
        if version != MANIFEST_VERSION:
            fix = f"this program reads version {MANIFEST_VERSION}: use the program that wrote it"
            return f"{manifest} has version {version}, {fix}"
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
        raise ValueError(f"file {name!r} is outside the checkpoint")
    return folder / name


def _describe(path: Path) -> dict[str, Any]:
    sha256 = None if path.suffix == _TENSOR_SUFFIX else file_digest(path)
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _list_digest(files: dict[str, Any]) -> str:
    return text_digest(json.dumps(files, sort_keys=True))
