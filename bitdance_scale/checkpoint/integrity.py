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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from bitdance_scale.atomic_files import write_text
from bitdance_scale.weight_files import find_irregular

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
_TENSOR_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileState:
    """A file as it was written.

    Attributes:
        num_bytes: its size.
        sha256: its digest, hexadecimal; None for tensor files, whose digests are in their index.
    """

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        sha256: of the list of files; it is the same for two checkpoints only if all of their files are.
        files: path in the checkpoint -> its file.
    """

    sha256: str
    files: Mapping[str, FileState]


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names it."""


def share_out(num_bytes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """The files that each rank takes: largest first, each to the rank that has the fewest bytes so far.

    Args:
        num_bytes: name -> size.
        num_ranks: how many share.
    """
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    load_bytes = [0] * num_ranks
    for name in sorted(num_bytes, key=lambda name: (-num_bytes[name], name)):
        rank = min(range(num_ranks), key=load_bytes.__getitem__)
        shares[rank].append(name)
        load_bytes[rank] += num_bytes[name]
    return shares


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


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in `folder`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    content = {"version": MANIFEST_VERSION, "files_sha256": _list_digest(files), "files": files}
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def find_damage(folder: Path, tensor_files: Collection[str] | None = None) -> str | None:
    """What is wrong with a committed checkpoint, naming the first file that is missing or changed; None if nothing is.

    Only the sizes of tensor files are compared here; the ranks hash them when they load.

    Args:
        folder: the checkpoint.
        tensor_files: names of the tensor files in question, such as `tensors/rank00000_000.safetensors`; others may be
            missing, as where only a part was fetched. None: all. Files that hold no tensors are always compared.
    """
    manifest = folder / MANIFEST_NAME
    try:
        if (manifest.is_symlink() or manifest.exists()) and (problem := find_irregular(manifest)) is not None:
            return problem
        linked = next((path for path in folder.glob("*") if path.is_symlink()), None)
        if linked is not None:
            return find_irregular(linked)
        files = read_manifest(manifest.read_bytes(), str(manifest)).files
    except FileNotFoundError:
        return f"{manifest} is missing" if folder.is_dir() else "there is no such checkpoint"
    except ManifestError as error:
        return str(error)
    except OSError as error:
        return f"{manifest} is damaged ({type(error).__name__}: {error})"
    asked = {name: file for name, file in files.items() if tensor_files is None or file.sha256 or name in tensor_files}
    changes = (find_change(folder / name, file.num_bytes, file.sha256) for name, file in asked.items())
    return next((change for change in changes if change is not None), None)


def read_manifest(content: bytes, name: str) -> Manifest:
    """What a manifest says.

    Args:
        content: of the file.
        name: what it is called in messages.

    Raises:
        ManifestError: it is damaged, of another version, or names a file outside its checkpoint.
    """
    try:
        tree = json.loads(content.decode("utf-8"))
        # Version 1 did not state its version.
        version = tree.get("version", 1)
        if version != MANIFEST_VERSION:
            fix = f"this program reads version {MANIFEST_VERSION}: use the program that wrote it"
            raise ManifestError(f"{name} has version {version}, {fix}")
        if tree["files_sha256"] != _list_digest(tree["files"]):
            raise ManifestError(f"{name} is damaged: the SHA-256 of its list is not that of what was written")
        files = {_inside(file): FileState(entry["bytes"], entry["sha256"]) for file, entry in tree["files"].items()}
    except ManifestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{name} is damaged ({type(error).__name__}: {error})") from error
    return Manifest(tree["files_sha256"], files)


def listed_bytes(folder: Path) -> int:
    """How large a committed checkpoint is, by its manifest; 0 if that cannot be read."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        return sum(int(entry["bytes"]) for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"file {name!r} is outside the checkpoint")
    return name


def _describe(path: Path) -> dict[str, Any]:
    sha256 = None if path.suffix == _TENSOR_SUFFIX else file_digest(path)
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _list_digest(files: dict[str, Any]) -> str:
    return text_digest(json.dumps(files, sort_keys=True))
