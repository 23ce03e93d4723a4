"""Where torch.distributed.checkpoint puts tensors: safetensors files of each rank, and a JSON index.

torch's own file-system storage pickles its metadata. A checkpoint that comes from someone else must not be unpickled,
so this storage has nothing to unpickle. Each file can also be read with the safetensors library alone.

A rank hashes what it writes while it writes; sizes and digests travel with torch's write results into the index. Before
anything
is loaded, every file that will be read is hashed again, each by one rank, and its headers are compared with the index.

Files are written in place: the folder they are in is renamed as a whole (`checkpoint/checkpoint_folder.py`). Each rank
forces its own files to storage, because the rank that renames may be on another node.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from bitdance_scale.atomic_files import sync, write_text
from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.integrity import find_change, tensor_bytes
from bitdance_scale.checkpoint.tensor_index import (
    INDEX_NAME,
    StoredFile,
    TensorIndex,
    box_key,
    encode_index,
    file_name,
    read_index,
)
from bitdance_scale.errors import CheckpointError, DamagedCheckpointError
from bitdance_scale.weight_files import SAFETENSORS_DTYPES, TensorSpec, encode_header, find_irregular


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
        """Nothing to reset: a writer has one folder and writes once."""
        assert checkpoint_id is None, "a writer belongs to its folder"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder; every rank does, whichever comes first."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells each rank its number, which is in the names of its files."""
        return [SavePlan(plan.items, rank, plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes, syncs and hashes this rank's files, as many as the byte limit asks for."""
        results: list[WriteResult] = []
        files = self._files(plan.items)
        # One buffer for all boxes: what is held does not depend on when the allocator returns memory.
        buffer = torch.empty(max(map(_num_bytes, plan.items), default=0), dtype=torch.uint8)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-digest") as thread:
            for number, items in enumerate(files):
                file = self._write_file(file_name(plan.storage_data, number), items, planner, buffer, thread)
                results.extend(WriteResult(item.index, _num_bytes(item), file) for item in items)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index; on the first rank, when all ranks have written.

        Raises:
            CheckpointError: a file of another rank is not in the folder that this rank sees.
        """
        files: dict[MetadataIndex, StoredFile] = {
            result.index: result.storage_data for rank in results for result in rank
        }
        for file in set(files.values()):
            if not (self._folder / file.name).is_file():
                raise CheckpointError(
                    f"{self._folder / file.name}: written by its rank but not seen by the first one; "
                    "put the run folder on a file system that all nodes share"
                )
        tensors = {name: _only_tensor(tensor) for name, tensor in metadata.state_dict_metadata.items()}
        write_text(self._folder / INDEX_NAME, encode_index(TensorIndex(tensors, files)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether this storage can hold a checkpoint of this name."""
        return isinstance(checkpoint_id, Path)

    def _write_file(
        self, name: str, items: list[WriteItem], planner: SavePlanner, buffer: torch.Tensor, thread: ThreadPoolExecutor
    ) -> StoredFile:
        """Writes a file and hashes, meanwhile and in another thread, what was handed to the file system."""
        # The widest dtypes first, so that all values are aligned.
        items = sorted(items, key=lambda item: -write_data_of(item).properties.dtype.itemsize)
        header = encode_header({box_key(item.index): _spec(item) for item in items})
        digest = hashlib.sha256(header)
        num_bytes = len(header)
        path = self._folder / name
        with path.open("wb") as file:
            file.write(header)
            for item in items:
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor), "only tensors are planned"
                if values.device.type != "cpu" or not values.is_contiguous():
                    values = buffer[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)
                content = tensor_bytes(values)
                hashed = thread.submit(digest.update, content)
                file.write(content)
                hashed.result()
                num_bytes += content.nbytes
        sync(path)
        return StoredFile(name, num_bytes, digest.hexdigest())

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
        checked: the files whose content this rank compares with their digests; each file is checked by one rank.
    """

    def __init__(self, folder: Path, index: TensorIndex, checked: Iterable[StoredFile]) -> None:
        self._folder = folder
        self._index = index
        self._metadata = index.metadata
        self._checked = tuple(checked)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a reader has one folder."""
        assert checkpoint_id is None, "a reader belongs to its folder"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, which was read before."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the reader has had the index from the start."""
        assert metadata is self._metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Compares the files with the index; torch raises one rank's error on all, before any of them reads."""
        for file in self._checked:
            damage = find_change(self._folder / file.name, file.num_bytes, file.sha256)
            if damage is not None:
                raise DamagedCheckpointError(damage)
        for name, items in self._by_file(plan).items():
            with opened(self._folder / name) as file:
                for item in items:
                    self._check_header(file, item)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each box of the plan from its mapped file to its place, in the order of the plan."""
        for name, items in itertools.groupby(plan.items, self._file_of):
            with opened(self._folder / name) as file:
                for item in items:
                    where = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    key = box_key(item.storage_index)
                    # safetensors refuses a slice of no dimensions: a scalar is read whole.
                    values = file.get_slice(key)[where] if where else file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
                    # The planner may have handed its memory over, and make more for the next item.
                    del target
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether this storage can hold a checkpoint of this name."""
        return isinstance(checkpoint_id, Path)

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of(item), []).append(item)
        return by_file

    def _file_of(self, item: ReadItem) -> str:
        return self._index.files[item.storage_index].name

    def _check_header(self, file: Any, item: ReadItem) -> None:
        key, number = box_key(item.storage_index), item.storage_index.index
        assert number is not None, "the items of a plan say which box they read"
        stored, tensor = file.get_slice(key), self._index.tensors[item.storage_index.fqn]
        sizes = list(tensor.chunks[number].sizes)
        if list(stored.get_shape()) != sizes:
            raise SafetensorError(f"{key} is {list(stored.get_shape())}, not {sizes}")
        if SAFETENSORS_DTYPES.get(stored.get_dtype()) != tensor.properties.dtype:
            raise SafetensorError(f"{key} is {stored.get_dtype()}, not {tensor.properties.dtype}")


class StoredTensors:
    """The tensors of one checkpoint, read some rows at a time without an engine, in whatever boxes they are stored.

    Args:
        folder: its `tensors/`.
        prefix: what the names of the tensors in question begin with; files without them may be missing.

    Raises:
        CheckpointError: its index cannot be read, or a file is missing or is no regular file.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder = folder
        self.index = read_index(folder)
        for file in self.index.files_of(prefix):
            problem = find_irregular(folder / file.name)
            if problem is not None:
                raise CheckpointError(f"{problem}; load another checkpoint")

    def __contains__(self, name: str) -> bool:
        return name in self.index.tensors

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self.index.spec(name).dtype

    def check_files(self, names: Iterable[str]) -> None:
        """Compares every file that holds a part of these tensors with what was written.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        wanted = set(names)
        for file in sorted({file for box, file in self.index.files.items() if box.fqn in wanted}):
            damage = find_change(self._folder / file.name, file.num_bytes, file.sha256)
            if damage is not None:
                raise CheckpointError(f"{damage}; convert another checkpoint")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (elements of a vector) start..stop of a tensor, in its dtype, in memory of their own."""
        spec = self.index.spec(name)
        wanted = Box.of_rows(start, stop - start, spec.shape)
        values = torch.empty(wanted.sizes, dtype=spec.dtype)
        for chunk in self.index.tensors[name].chunks:
            box = Box.of_chunk(chunk)
            common = box.intersect(wanted)
            if common is None:
                continue
            index = MetadataIndex(name, chunk.offsets)
            # Opened for each part: what was read of a mapped file stays resident until the file is closed.
            with opened(self._folder / self.index.files[index].name) as file:
                values[common.slices_in(wanted)] = file.get_slice(box_key(index))[common.slices_in(box)]
        return values


@contextlib.contextmanager
def opened(path: Path, fix: str = "load another checkpoint") -> Iterator[Any]:
    """A safetensors file, mapped. Errors of the file or the library are raised with the file's name and `fix`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error}); {fix}") from error


def write_data_of(item: WriteItem) -> TensorWriteData:
    """Box, shape and dtype of an item of a save plan."""
    assert item.tensor_data is not None, "only tensors are planned"
    return item.tensor_data


def _only_tensor(metadata: object) -> TensorStorageMetadata:
    assert isinstance(metadata, TensorStorageMetadata), "only tensors are planned"
    return metadata


def _num_bytes(item: WriteItem) -> int:
    data = write_data_of(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _spec(item: WriteItem) -> TensorSpec:
    data = write_data_of(item)
    return TensorSpec(tuple(data.chunk.sizes), data.properties.dtype)
