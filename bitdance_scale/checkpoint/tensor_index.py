"""The index of a folder of sharded tensors: JSON, so that there is nothing in it to unpickle.

It says of every file its size and SHA-256, and of every tensor its shape, its dtype and which box of it lies in which
file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from bitdance_scale.checkpoint.boxes import Box, find_overlap
from bitdance_scale.errors import CheckpointError

INDEX_NAME = "index.json"
INDEX_VERSION = 2
_FILE_NAME = re.compile(r"rank\d{5,}_\d{3,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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


def file_name(rank: int, number: int) -> str:
    """Name of the `number`-th file of a rank; other names are refused in an index."""
    return f"rank{rank:05d}_{number:03d}.safetensors"


def box_key(index: MetadataIndex) -> str:
    """What a box is called in its file: the tensor's name and the box's corner."""
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def encode_index(metadata: Metadata) -> str:
    """The text of `index.json`.

    Args:
        metadata: tensors and chunks; `storage_data` has the `StoredFile` of each chunk.
    """
    files = sorted(set(metadata.storage_data.values()))
    number = {file: i for i, file in enumerate(files)}
    tensors = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        chunks = [
            [list(chunk.offsets), list(chunk.sizes), number[metadata.storage_data[MetadataIndex(name, chunk.offsets)]]]
            for chunk in tensor.chunks
        ]
        dtype_name = _DTYPE_NAMES[tensor.properties.dtype]
        tensors[name] = {"shape": list(tensor.size), "dtype": dtype_name, "chunks": chunks}
    content = {
        "version": INDEX_VERSION,
        "files": [[file.name, file.num_bytes, file.sha256] for file in files],
        "tensors": tensors,
    }
    return json.dumps(content, separators=(",", ":"))


def read_index(folder: Path) -> Metadata:
    """Reads what a folder of sharded tensors holds; no tensor file is opened.

    Returns:
        Tensors and chunks; `storage_data` has the `StoredFile` of each chunk.

    Raises:
        CheckpointError: no index, one that is not ours or of another version, or one whose boxes do not make up the
            tensors they belong to.
    """
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version != INDEX_VERSION:
            raise CheckpointError(
                f"{path}: version {version}, this program reads {INDEX_VERSION}; use the one that wrote it"
            )
        return _decode(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable index of tensors ({type(error).__name__}: {error}); load another checkpoint"
        ) from error


def _decode(content: dict[str, Any]) -> Metadata:
    files = [_decode_file(*entry) for entry in content["files"]]
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, StoredFile] = {}
    for name, tensor in content["tensors"].items():
        shape, boxes = tuple(tensor["shape"]), []
        for offsets, sizes, file in tensor["chunks"]:
            boxes.append(Box(tuple(offsets), tuple(sizes)))
            storage[MetadataIndex(name, offsets)] = files[file]
        _check_cover(name, shape, boxes)
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]
        properties = TensorProperties(dtype=_DTYPES[tensor["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    return Metadata(tensors, storage_data=storage)


def _decode_file(name: str, num_bytes: int, sha256: str) -> StoredFile:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file {name!r} is none of this folder's, which are called like {file_name(0, 0)}")
    if not _SHA256.fullmatch(sha256) or not isinstance(num_bytes, int):
        raise ValueError(f"file {name}: {num_bytes!r}, {sha256!r} is not a size and a SHA-256")
    return StoredFile(name, num_bytes, sha256)


def _check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Boxes inside the shape, as many elements as it has, none twice: then every element is in one box."""
    for box in boxes:
        if not all(0 <= o < o + n <= size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            raise ValueError(f"tensor {name}: {box} leaves its shape {list(shape)}")
    if sum(box.num_elements for box in boxes) != math.prod(shape):
        raise ValueError(f"tensor {name}: its parts do not add up to its shape {list(shape)}")
    overlap = find_overlap(boxes)
    if overlap is not None:
        raise ValueError(f"tensor {name}: {overlap[0]} and {overlap[1]} overlap")
