"""The tensors of a published folder, read part by part (BitDance's release, or a plain Qwen3)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitdance_scale.checkpoint.names import Part, PublishedTensor
from bitdance_scale.checkpoint.storage import opened
from bitdance_scale.checkpoint.tensor_file import DTYPES, TensorSpec
from bitdance_scale.errors import CheckpointError

BACKBONE_NAME = "model.safetensors"
BACKBONE_INDEX_NAME = "model.safetensors.index.json"
PART_FILES: Mapping[Part, str] = {Part.HEAD: "vision_head.safetensors", Part.PROJECTOR: "projector.safetensors"}
_MAX_NAMED_PROBLEMS = 3
_FIX = "fetch the folder again"


@dataclass(frozen=True)
class FoundTensor:
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    spec: TensorSpec


class PublishedTensors:
    """The tensors of one part of a folder; only headers are read when it is made.

    Args:
        folder: the published folder.
        part: whose files are read.

    Attributes:
        found: name -> where it is.

    Raises:
        CheckpointError: a file is missing or damaged, or holds a dtype that weights do not have.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.part, self._folder = part, folder
        self.found: dict[str, FoundTensor] = {}
        listed = _listed_files(folder) if part is Part.BACKBONE else {folder / PART_FILES[part]: None}
        for path, names in listed.items():
            headers = _read_header(path)
            if names is not None and {*headers} != names:
                odd = sorted({*headers} ^ names)[0]
                raise CheckpointError(
                    f"{path}: {odd} is {'in the file, not' if odd in headers else 'not in the file, but'} in "
                    f"{BACKBONE_INDEX_NAME}; fetch the folder again"
                )
            self.found |= {name: FoundTensor(path, spec) for name, spec in headers.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of the part; `check` has seen that it has one."""
        return next(iter(self.found.values())).spec.dtype

    def check(self, wanted: Mapping[str, PublishedTensor]) -> None:
        """Compares names, shapes and dtypes with those of a network.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or of another dtype than the first.
        """
        problems = [*self._differences(wanted)]
        if problems:
            more = f"; and {len(problems) - _MAX_NAMED_PROBLEMS} more" if len(problems) > _MAX_NAMED_PROBLEMS else ""
            raise CheckpointError(f"{self._folder}: {'; '.join(problems[:_MAX_NAMED_PROBLEMS])}{more}")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (elements of a vector) start..stop of a tensor, in its dtype, in memory of their own."""
        # Opened for each part: what a mapping has touched stays resident until it is closed.
        with opened(self.found[name].file, _FIX) as file:
            return file.get_slice(name)[start:stop].clone()

    def _differences(self, wanted: Mapping[str, PublishedTensor]) -> Iterator[str]:
        files = ", ".join(sorted({found.file.name for found in self.found.values()}))
        yield from (
            f"{name}: missing from {files}, expected {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name not in self.found
        )
        first = next(iter(self.found.values())).spec.dtype
        for name, found in self.found.items():
            if name not in wanted:
                yield f"{name} in {found.file.name}: no tensor of this network"
            elif found.spec.shape != wanted[name].shape:
                shape = list(found.spec.shape)
                yield f"{name} in {found.file.name}: shape {shape}, expected {list(wanted[name].shape)}"
            elif found.spec.dtype != first:
                yield f"{name} in {found.file.name}: {found.spec.dtype}, expected {first} as the first tensor has"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, or no such content.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object; fetch it again")
    return content


def _listed_files(folder: Path) -> dict[Path, set[str] | None]:
    """The backbone's files, with the tensors that the index says are in each."""
    index = folder / BACKBONE_INDEX_NAME
    if not index.is_file():
        return {folder / BACKBONE_NAME: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensors and files; fetch it again")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} is in {file!r}, which is no name of a file in this folder")
        files.setdefault(folder / file, set()).add(name)
    return files


def _read_header(path: Path) -> dict[str, TensorSpec]:
    specs = {}
    with opened(path, _FIX) as file:
        for name in file.keys():  # noqa: SIM118  (the library's handle is no mapping)
            entry = file.get_slice(name)
            dtype = DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} is {entry.get_dtype()}; weights are expected in {', '.join(DTYPES)}"
                )
            specs[name] = TensorSpec(tuple(entry.get_shape()), dtype)
    if not specs:
        raise CheckpointError(f"{path}: holds no tensor; fetch it again")
    return specs
