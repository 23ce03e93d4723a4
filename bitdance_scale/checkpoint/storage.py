"""Where torch.distributed.checkpoint puts tensors: safetensors files of each rank, and a JSON index.

torch's own file-system storage pickles its metadata; a checkpoint handed in by someone else must not be unpickled, so
this storage has nothing to unpickle. The index says of every tensor its shape, its dtype and which box of it lies in
which file; each file can also be read with the safetensors library alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bitdance_scale.checkpoint import durable
from bitdance_scale.errors import CheckpointError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsWriter(StorageWriter):
    """Writes this rank's share of a save plan.

    Args:
        folder: where the files go.
        max_file_bytes: tensor bytes per file, which is also what is held on the host at a time.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "a writer belongs to its folder"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, f"rank{rank:05d}", plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and syncs `<rank>_<n>.safetensors`, as many as the byte limit asks for."""
        results: list[WriteResult] = []
        for number, items in enumerate(self._files(plan.items)):
            name = f"{plan.storage_data}_{number:03d}.safetensors"
            self._write_file(self._folder / name, items, planner)
            results.extend(WriteResult(item.index, _num_bytes(item), name) for item in items)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        for name in set(metadata.storage_data.values()):
            if not (self._folder / name).is_file():
                raise CheckpointError(
                    f"{self._folder / name}: written by its rank but not seen by the first one; "
                    "put the run folder on a file system that all nodes share"
                )
        durable.write_text(self._folder / INDEX_NAME, _encode_index(metadata))
        durable.sync(self._folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Path)

    def _write_file(self, path: Path, items: list[WriteItem], planner: SavePlanner) -> None:
        # A copy even on the CPU: safetensors refuses tensors that share storage, as views of one flat buffer do.
        tensors = {
            _key(item.index): planner.resolve_data(item).to("cpu", copy=True, memory_format=torch.contiguous_format)
            for item in items
        }
        save_file(tensors, path)
        durable.sync(path)

    def _files(self, items: list[WriteItem]) -> list[list[WriteItem]]:
        files: list[list[WriteItem]] = []
        free_bytes = 0
        for item in items:
            if not files or _num_bytes(item) > free_bytes:
                files.append([])
                free_bytes = self._max_file_bytes
            files[-1].append(item)
            free_bytes -= _num_bytes(item)
        return files


class SafetensorsReader(StorageReader):
    """Reads the boxes of a load plan, and no more than them, straight into the tensors they belong to.

    Args:
        folder: where the files lie.
        index: what `read_index` returned for the folder.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        self._folder = folder
        self._index = index

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "a reader belongs to its folder"

    def read_metadata(self) -> Metadata:
        return self._index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        assert metadata is self._index

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._index.storage_data[item.storage_index], []).append(item)
        for name, items in by_file.items():
            path = self._folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    for item in items:
                        self._read_item(file, item, planner)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); resume from another checkpoint") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_item(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        stored = file.get_slice(_key(item.storage_index))
        chunk = self._index.state_dict_metadata[item.storage_index.fqn].chunks[item.storage_index.index]
        if tuple(stored.get_shape()) != tuple(chunk.sizes):
            raise SafetensorError(f"{_key(item.storage_index)} is {stored.get_shape()}, not {list(chunk.sizes)}")
        where = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
        # A slice of no dimensions is refused by safetensors; a scalar is read whole.
        values = stored[where] if where else file.get_tensor(_key(item.storage_index))
        target = planner.resolve_tensor(item)
        if values.dtype != target.dtype:
            raise SafetensorError(f"{_key(item.storage_index)} is {values.dtype}, not {target.dtype}")
        target.copy_(values)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Path)


def read_index(folder: Path) -> Metadata:
    """Reads what a folder of sharded tensors holds.

    Raises:
        CheckpointError: no index, one that is not ours or of another version, or one whose boxes do not add up to the
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
        return _decode_index(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a readable index of tensors ({type(error).__name__}: {error}); resume from another checkpoint"
        ) from error


def _encode_index(metadata: Metadata) -> str:
    names = sorted(set(metadata.storage_data.values()))
    number = {name: i for i, name in enumerate(names)}
    tensors = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        chunks = [
            [list(chunk.offsets), list(chunk.sizes), number[metadata.storage_data[MetadataIndex(name, chunk.offsets)]]]
            for chunk in tensor.chunks
        ]
        dtype_name = _DTYPE_NAMES[tensor.properties.dtype]
        tensors[name] = {"shape": list(tensor.size), "dtype": dtype_name, "chunks": chunks}
    return json.dumps({"version": INDEX_VERSION, "files": names, "tensors": tensors}, separators=(",", ":"))


def _decode_index(content: dict[str, Any]) -> Metadata:
    files = content["files"]
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"file {name!r} lies outside the folder")
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, str] = {}
    for name, tensor in content["tensors"].items():
        size = torch.Size(tensor["shape"])
        chunks = []
        for offsets, sizes, file in tensor["chunks"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            storage[MetadataIndex(name, offsets)] = files[file]
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise ValueError(f"tensor {name}: its parts do not add up to its shape {list(size)}")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=_DTYPES[tensor["dtype"]]), size, chunks)
    return Metadata(tensors, storage_data=storage)


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _num_bytes(item: WriteItem) -> int:
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
