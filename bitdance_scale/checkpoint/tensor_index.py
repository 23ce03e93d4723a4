"""The index of a folder of sharded tensors: JSON, so that there is nothing in it to unpickle.

It states the size and SHA-256 of every file; and for every tensor its shape, its dtype and which box of it is in which
file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bitdance_scale.checkpoint.boxes import Box, find_overlap
from bitdance_scale.errors import CheckpointError, DamagedCheckpointError
from bitdance_scale.weight_files import SAFETENSORS_DTYPES, TensorSpec, dtype_name

INDEX_NAME = "index.json"
INDEX_VERSION = 2
_FILE_NAME = re.compile(r"rank\d{5,}_\d{3,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}


@dataclass(frozen=True, order=True)
class StoredFile:
    """A file of tensors as its rank wrote it.

    Attributes:
        name: its name in the folder.
        num_bytes: its size.
        sha256: its digest, hexadecimal.
    """

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorIndex:
    """What is in a folder of sharded tensors.

    Attributes:
        tensors: name -> shape, dtype and boxes.
        files: tensor and corner of a box -> the file that holds the box.
    """

    tensors: Mapping[str, TensorStorageMetadata]
    files: Mapping[MetadataIndex, StoredFile]

    @property
    def metadata(self) -> Metadata:
        """The same in torch.distributed.checkpoint's terms."""
        return Metadata(dict(self.tensors), storage_data=self.files)

    def files_of(self, prefix: str) -> set[StoredFile]:
        """The files that hold a part of any tensor whose name begins with a prefix."""
        return {file for box, file in self.files.items() if box.fqn.startswith(prefix)}

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        tensor = self.tensors[name]
        return TensorSpec(tuple(tensor.size), tensor.properties.dtype)


def file_name(rank: int, number: int) -> str:
    """Name of the `number`-th file of a rank; other names are refused in an index."""
    return f"rank{rank:05d}_{number:03d}.safetensors"


def box_key(index: MetadataIndex) -> str:
    """Name of a box in its file: the tensor's name and the box's corner."""
    assert index.offset is not None, f"{index.fqn}: a box has a corner"
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def encode_index(index: TensorIndex) -> str:
    """The text of `index.json`."""
    files = sorted(set(index.files.values()))
    number = {file: i for i, file in enumerate(files)}
    tensors = {}
    for name, tensor in sorted(index.tensors.items()):
        chunks = [
            [list(chunk.offsets), list(chunk.sizes), number[index.files[MetadataIndex(name, chunk.offsets)]]]
            for chunk in tensor.chunks
        ]
        tensors[name] = {"shape": list(tensor.size), "dtype": dtype_name(tensor.properties.dtype), "chunks": chunks}
    content = {
        "version": INDEX_VERSION,
        "files": [[file.name, file.num_bytes, file.sha256] for file in files],
        "tensors": tensors,
    }
    return json.dumps(content, separators=(",", ":"))


def read_index(folder: Path) -> TensorIndex:
    """Reads what a folder of sharded tensors holds; no tensor file is opened.

    Raises:
        CheckpointError: there is no index, it is damaged or of another version, or its boxes do not make up the tensors
            they belong to.
    """
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version != INDEX_VERSION:
            raise CheckpointError(
                f"{path}: version {version}, this program reads version {INDEX_VERSION}; use the program that wrote it"
            )
        return _decode(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{path}: not a readable index of tensors ({type(error).__name__}: {error}); load another checkpoint"
        ) from error


def _decode(content: dict[str, Any]) -> TensorIndex:
    files = [_decode_file(*entry) for entry in content["files"]]
    tensors: dict[str, TensorStorageMetadata] = {}
    file_of_box: dict[MetadataIndex, StoredFile] = {}
    for name, tensor in content["tensors"].items():
        shape, boxes = tuple(tensor["shape"]), []
        for offsets, sizes, file in tensor["chunks"]:
            boxes.append(Box(tuple(offsets), tuple(sizes)))
            file_of_box[MetadataIndex(name, offsets)] = files[file]
        _check_cover(name, shape, boxes)
        chunks: list[ChunkStorageMetadata] = [box.chunk for box in boxes]
        properties = TensorProperties(dtype=_DTYPES[tensor["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    return TensorIndex(tensors, file_of_box)


def _decode_file(name: str, num_bytes: int, sha256: str) -> StoredFile:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file {name!r} is not one of this folder, whose names are like {file_name(0, 0)}")
    if not _SHA256.fullmatch(sha256) or not isinstance(num_bytes, int):
        raise ValueError(f"file {name}: {num_bytes!r}, {sha256!r} is not a size and a SHA-256")
    return StoredFile(name, num_bytes, sha256)


def _check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """The boxes are inside the shape, do not overlap and have as many elements: so every element is in one box."""
    for box in boxes:
        if not all(0 <= o < o + n <= size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            raise ValueError(f"tensor {name}: {box} leaves its shape {list(shape)}")
    if sum(box.num_elements for box in boxes) != math.prod(shape):
        raise ValueError(f"tensor {name}: its parts do not add up to its shape {list(shape)}")
    overlap = find_overlap(boxes)
    if overlap is not None:
        raise ValueError(f"tensor {name}: {overlap[0]} and {overlap[1]} overlap")
