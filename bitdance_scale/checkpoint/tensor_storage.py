"""Where torch.distributed.checkpoint puts tensors: safetensors files of each rank, and a JSON index.

torch's own file-system storage pickles its metadata; a checkpoint handed in by someone else must not be unpickled, so
this storage has nothing to unpickle. Each file can also be read with the safetensors library alone.

A rank hashes the files it writes; sizes and digests travel with torch's write results into the index. Before anything
is loaded every file that will be read is hashed again, by one rank each, and its headers are compared with the index.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bitdance_scale.atomic_files import sync, write_text
from bitdance_scale.checkpoint.digest import find_change, saved_digest
from bitdance_scale.checkpoint.tensor_index import INDEX_NAME, StoredFile, box_key, encode_index, file_name
from bitdance_scale.errors import CheckpointError

_ALIGNMENT_BYTES = 64
_HEADER_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


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
        return [SavePlan(plan.items, rank, plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes, syncs and hashes this rank's files, as many as the byte limit asks for."""
        results: list[WriteResult] = []
        files = self._files(plan.items)
        # One buffer for all files: what is held does not depend on when the allocator returns memory.
        buffer = np.empty(max((sum(map(_num_buffer_bytes, items)) for items in files), default=0), dtype=np.uint8)
        for number, items in enumerate(files):
            file = self._write_file(file_name(plan.storage_data, number), items, planner, buffer)
            results.extend(WriteResult(item.index, _num_bytes(item), file) for item in items)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        for file in set(metadata.storage_data.values()):
            if not (self._folder / file.name).is_file():
                raise CheckpointError(
                    f"{self._folder / file.name}: written by its rank but not seen by the first one; "
                    "put the run folder on a file system that all nodes share"
                )
        write_text(self._folder / INDEX_NAME, encode_index(metadata))
        sync(self._folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Path)

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner, buffer: np.ndarray) -> StoredFile:
        # Copied even on the CPU, each into a storage of its own: safetensors refuses tensors that share one, as the
        # engines' views of a flat buffer do.
        tensors: dict[str, torch.Tensor] = {}
        start = 0
        for item in items:
            values = planner.resolve_data(item)
            room = torch.from_numpy(buffer[start : start + values.nbytes])
            tensors[box_key(item.index)] = room.view(values.dtype).view(values.shape).copy_(values)
            start += _num_buffer_bytes(item)
        path = self._folder / name
        save_file(tensors, path)
        sync(path)
        return StoredFile(name, *saved_digest(path, tensors))

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
        checked: the files whose content this rank compares with their digests; the ranks deal out all that is read.
    """

    def __init__(self, folder: Path, index: Metadata, checked: Iterable[StoredFile]) -> None:
        self._folder = folder
        self._index = index
        self._checked = tuple(checked)

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "a reader belongs to its folder"

    def read_metadata(self) -> Metadata:
        return self._index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        assert metadata is self._index

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Compares the files with the index; torch raises one rank's error on all, before any of them reads."""
        for file in self._checked:
            damage = find_change(self._folder / file.name, file.num_bytes, file.sha256)
            if damage is not None:
                raise CheckpointError(f"{damage}; load another checkpoint (a run loads the one its `latest` names)")
        for name, items in self._by_file(plan).items():
            with opened(self._folder / name) as file:
                for item in items:
                    self._check_header(file, item)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name, items in self._by_file(plan).items():
            with opened(self._folder / name) as file:
                for item in items:
                    where = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    key = box_key(item.storage_index)
                    # A slice of no dimensions is refused by safetensors; a scalar is read whole.
                    values = file.get_slice(key)[where] if where else file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Path)

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._index.storage_data[item.storage_index].name, []).append(item)
        return by_file

    def _check_header(self, file: Any, item: ReadItem) -> None:
        key = box_key(item.storage_index)
        stored = file.get_slice(key)
        tensor = self._index.state_dict_metadata[item.storage_index.fqn]
        sizes = list(tensor.chunks[item.storage_index.index].sizes)
        if list(stored.get_shape()) != sizes:
            raise SafetensorError(f"{key} is {list(stored.get_shape())}, not {sizes}")
        if _HEADER_DTYPES.get(stored.get_dtype()) != tensor.properties.dtype:
            raise SafetensorError(f"{key} is {stored.get_dtype()}, not {tensor.properties.dtype}")


@contextlib.contextmanager
def opened(path: Path, fix: str = "load another checkpoint") -> Iterator[Any]:
    """A safetensors file, mapped; what goes wrong with it is told with its name and `fix`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {fix}") from error


def _num_bytes(item: WriteItem) -> int:
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _num_buffer_bytes(item: WriteItem) -> int:
    return -(-_num_bytes(item) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
