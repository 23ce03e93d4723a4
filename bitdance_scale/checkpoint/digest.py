"""SHA-256 of a checkpoint's files: what they must hold, and whether they still do.

SHA-256 because current processors have instructions for it: there it is the fastest hash of Python's standard library
that is not a mere checksum (docs/checkpoints.md has the rates), and it is the digest of everything else in a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

_LENGTH_BYTES = 8


def text_digest(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read through a buffer of 256 KiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def saved_digest(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """(size in bytes, hexadecimal SHA-256) that a safetensors file has if it holds `tensors`.

    Only the header is read back; the values are those in memory, so that an error on their way to storage is noticed
    when the file is loaded, and nothing is read twice.

    Args:
        path: the file, just written: the header's length as 8 bytes, little-endian, the header as JSON, the values
            in the order of their offsets (https://huggingface.co/docs/safetensors).
        tensors: contiguous tensors on the CPU, by their names in the file.
    """
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header = file.read(int.from_bytes(prefix, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    digest = hashlib.sha256(prefix + header)
    num_bytes = len(prefix) + len(header)
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        values = tensors[name].reshape(-1).view(torch.uint8)
        digest.update(values.numpy())
        num_bytes += values.numel()
    return num_bytes, digest.hexdigest()


def find_change(path: Path, num_bytes: int, sha256: str | None) -> str | None:
    """What is wrong with a file that was written with this size and digest, naming it; None if nothing is.

    Args:
        path: the file.
        num_bytes: its size in bytes.
        sha256: its digest; None compares the size alone.
    """
    try:
        if not path.is_file():
            return f"{path} is missing"
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            return f"{path} has {found_bytes} bytes, {num_bytes} were written"
        if sha256 is not None and file_digest(path) != sha256:
            return f"{path} is damaged: its SHA-256 is not that of what was written"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None
