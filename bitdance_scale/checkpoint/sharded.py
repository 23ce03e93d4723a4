"""Save and load of sharded tensors from and to any layout, with torch.distributed.checkpoint.

Every rank brings boxes of global tensors (`ShardedValue`). Saving writes each element once, however many ranks hold it.
Loading fills the boxes that the ranks hold now. Only descriptions of boxes travel between ranks, never values.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bitdance_scale.atomic_files import is_disk_full
from bitdance_scale.checkpoint.boxes import Box, disjoint_parts
from bitdance_scale.checkpoint.integrity import share_out
from bitdance_scale.checkpoint.tensor_index import StoredFile, TensorIndex, read_index
from bitdance_scale.checkpoint.tensor_storage import SafetensorsReader, SafetensorsWriter, write_data_of
from bitdance_scale.errors import CheckpointError, DamagedCheckpointError, DiskFullError
from bitdance_scale.parallel.agreement import describe_failures, on_first_rank
from bitdance_scale.parallel.partition import ConsumedValue, ShardedValue, whole_pieces
from bitdance_scale.wording import first_few

DEFAULT_MAX_FILE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class StreamedValue:
    """A tensor that is made while it is written, so that it need not be held.

    Attributes:
        global_shape: shape of the whole tensor.
        dtype: its dtype.
        boxes: disjoint boxes that this rank writes.
        read: returns the values of a box inside one of them.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    read: Callable[[Box], torch.Tensor]


def save_sharded(
    folder: Path,
    values: Mapping[str, ShardedValue | StreamedValue],
    group: dist.ProcessGroup | None = None,
    *,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
) -> None:
    """Writes the tensors whose pieces the ranks of `group` hold; a collective.

    Args:
        folder: made if absent; on a file system that all ranks share.
        values: what this rank holds, by the tensors' global names. The pieces of all ranks must cover every tensor.
        group: the ranks that take part; None: all, or this process alone without a process group.
        max_file_bytes: most tensor bytes per file, and most host memory that a rank uses beyond what it holds (larger
            pieces are cut).

    Raises:
        CheckpointError: on every rank, when a rank could not write.
    """
    with _dcp_errors(f"{folder}: tensors not written", group):
        save(
            dict(values),
            storage_writer=SafetensorsWriter(folder, max_file_bytes),
            planner=_SavePieces(max_file_bytes),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def planned_boxes(
    values: Mapping[str, ShardedValue],
    group: dist.ProcessGroup | None = None,
    *,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
) -> dict[str, list[Box]]:
    """Which boxes this rank writes when `values` are saved, of those that it holds; a collective.

    Args:
        values: what this rank holds, as for `save_sharded`.
        group: as for `save_sharded`.
        max_file_bytes: as for `save_sharded`.
    """
    planner = _SavePieces(max_file_bytes)
    planner.set_up_planner(dict(values))
    plan = planner.create_local_plan()
    if dist.is_initialized():
        size, first = dist.get_world_size(group), 0 if group is None else dist.get_global_rank(group, 0)
        is_first = dist.get_rank(group) == 0
        gathered: list[Any] | None = [None] * size if is_first else None
        dist.gather_object(plan, gathered, dst=first, group=group)
        shares = planner.create_global_plan(gathered)[0] if gathered is not None else [None] * size
        own: list[Any] = [None]
        dist.scatter_object_list(own, shares, src=first, group=group)
        plan = own[0]
    else:
        plan = planner.create_global_plan([plan])[0][0]
    boxes: dict[str, list[Box]] = {}
    for item in plan.items:
        boxes.setdefault(item.index.fqn, []).append(Box.of_chunk(write_data_of(item).chunk))
    return boxes


def values_in(value: ShardedValue, box: Box) -> torch.Tensor:
    """The values of a box that lies within one of the pieces; a view."""
    for piece in value.pieces:
        if Box.of_piece(piece).intersect(box) == box:
            return piece.tensor.detach()[box.slices_in(Box.of_piece(piece))]
    raise AssertionError(f"{box} is not held by this rank")


def load_sharded(
    folder: Path,
    values: Mapping[str, ShardedValue | ConsumedValue],
    group: dist.ProcessGroup | None = None,
    *,
    prefix: str = "",
    converts_dtype: bool = False,
    is_verified: bool = False,
    unread: Callable[[str], bool] | None = None,
) -> None:
    """Fills the pieces of `values` in place from a folder that `save_sharded` wrote under any layout; a collective.

    Args:
        folder: the folder.
        values: what this rank holds now, or what takes a tensor once it is read; names start with `prefix`. The latter
            are read last, one after the other.
        group: the ranks that take part; None: all, or this process alone without a process group.
        prefix: the part of the checkpoint that is wanted; each of its tensors must be held by some rank.
        converts_dtype: whether tensors of another dtype are converted instead of refused.
        unread: whether a stored tensor is not asked for, by its name; None: all are.
        is_verified: whether the content of the files was compared with their digests just before.

    Raises:
        CheckpointError: on every rank, before any tensor is written to: the checkpoint lacks a tensor or holds an extra
            one, a tensor has another shape or dtype, a file is missing or is not what was written. Only a device that
            fails between this check and the reading leaves the tensors half filled.
    """
    index = on_first_rank(lambda: read_index(folder), group, other=CheckpointError)
    rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    checked = [] if is_verified else _files_to_check(index, prefix, num_ranks)[rank]
    with _dcp_errors(f"{folder}: not loaded", group):
        load(
            dict(values),
            storage_reader=SafetensorsReader(folder, index, checked),
            planner=_LoadPieces(index, prefix, converts_dtype, unread),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def _files_to_check(index: TensorIndex, prefix: str, num_ranks: int) -> list[list[StoredFile]]:
    """The files that each rank hashes."""
    wanted = {file.name: file for file in index.files_of(prefix)}
    shares = share_out({name: file.num_bytes for name, file in wanted.items()}, num_ranks)
    return [[wanted[name] for name in share] for share in shares]


@contextlib.contextmanager
def _dcp_errors(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raises torch's exception as ours. torch raises it on all ranks, and it is no `Exception`."""
    try:
        if dist.is_initialized():
            yield
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                yield
    except CheckpointException as failure:
        problems = {
            rank: str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            for rank, (error, _) in failure.failures.items()
        }
        num_ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        kind = _kind_of([error for error, _ in failure.failures.values()])
        raise kind(f"{what}: {describe_failures(problems, num_ranks)}") from failure


def _kind_of(errors: Sequence[BaseException]) -> type[CheckpointError]:
    if any(is_disk_full(error) for error in errors):
        return DiskFullError
    is_damage = all(isinstance(error, DamagedCheckpointError) for error in errors)
    return DamagedCheckpointError if is_damage else CheckpointError


class _SavePieces(SavePlanner):
    """Plans which rank writes which box."""

    def __init__(self, max_chunk_bytes: int) -> None:
        self._max_chunk_bytes = max_chunk_bytes

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._values: dict[str, ShardedValue | StreamedValue] = state_dict

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for name, value in self._values.items():
            max_elements = max(self._max_chunk_bytes // value.dtype.itemsize, 1)
            for box in _boxes(name, value):
                items.extend(_write_item(name, value, part) for part in box.cut(max_elements))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Gives every element to one rank; of the ranks that hold a box, the one with the least to write gets it."""
        holders: dict[str, dict[Box, list[int]]] = {}
        data: dict[str, TensorWriteData] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                name, write = item.index.fqn, write_data_of(item)
                first = data.setdefault(name, write)
                assert (first.size, first.properties.dtype) == (write.size, write.properties.dtype), (
                    f"{name}: ranks disagree on its shape or dtype"
                )
                holders.setdefault(name, {}).setdefault(Box.of_chunk(write.chunk), []).append(rank)
        planned: list[list[WriteItem]] = [[] for _ in all_plans]
        load_bytes = [0] * len(all_plans)
        tensors: dict[str, TensorStorageMetadata] = {}
        for name, boxes in holders.items():
            size, properties = data[name].size, data[name].properties
            chunks: list[ChunkStorageMetadata] = []
            for box, part in disjoint_parts(boxes):
                rank = min(boxes[box], key=load_bytes.__getitem__)
                load_bytes[rank] += part.num_elements * properties.dtype.itemsize
                chunk = part.chunk
                index = MetadataIndex(name, part.offsets, len(chunks))
                write = TensorWriteData(chunk, properties, size)
                planned[rank].append(WriteItem(index, WriteItemType.SHARD, tensor_data=write))
                chunks.append(chunk)
            covered = sum(math.prod(chunk.sizes) for chunk in chunks)
            assert covered == math.prod(size), f"{name}: the ranks hold {covered} of {math.prod(size)} elements"
            tensors[name] = TensorStorageMetadata(properties, size, chunks)
        return [SavePlan(items) for items in planned], Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        box = Box.of_chunk(write_data_of(write_item).chunk)
        value = self._values[write_item.index.fqn]
        if isinstance(value, StreamedValue):
            return value.read(box)
        return values_in(value, box)


class _LoadPieces(LoadPlanner):
    """Plans which stored boxes fill the boxes held here, after checking that they are of the same model.

    What is held is filled in the order of the files. What is handed over comes tensor by tensor, so that one at a time
    is open.
    """

    def __init__(
        self, index: TensorIndex, prefix: str, converts_dtype: bool, unread: Callable[[str], bool] | None
    ) -> None:
        self._index, self._stored, self._unread = index, index.tensors, unread
        self._prefix = prefix
        self._converts_dtype = converts_dtype

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._values: dict[str, ShardedValue | ConsumedValue] = state_dict
        self._targets = {
            (name, piece.offsets): piece.tensor
            for name, value in self._values.items()
            if isinstance(value, ShardedValue)
            for piece in value.pieces
        }
        self._open: dict[str, torch.Tensor] = {}
        self._num_left: Counter[str] = Counter()

    def create_local_plan(self) -> LoadPlan:
        _refuse([problem for name, value in self._values.items() for problem in self._differences(name, value)])
        held: list[ReadItem] = []
        consumed: list[ReadItem] = []
        for name, value in self._values.items():
            chunks = [Box.of_piece(piece).chunk for piece in value.pieces]
            reads = create_read_items_for_chunk_list(name, self._stored[name], chunks)
            wanted = sum(piece.tensor.numel() for piece in value.pieces)
            found = sum(math.prod(read.lengths) for read in reads)
            if found != wanted:
                raise CheckpointError(f"tensor {name}: parts overlap or are missing; the checkpoint is damaged")
            (consumed if isinstance(value, ConsumedValue) else held).extend(reads)
        self._num_left.update(item.dest_index.fqn for item in consumed)
        held.sort(key=lambda item: self._index.files[item.storage_index].name)
        return LoadPlan([*held, *consumed], planner_data=sorted(self._values))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {name for plan in global_plan for name in plan.planner_data}
        stored = [name for name in self._stored if self._unread is None or not self._unread(name)]
        extra = [name for name in stored if name.startswith(self._prefix) and name not in wanted]
        _refuse([f"{name}: in the checkpoint, not in this model" for name in sorted(extra)])
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("the index holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        name, corner = read_item.dest_index.fqn, read_item.dest_index.offset
        assert corner is not None, "the items of a plan say which piece they fill"
        value = self._values[name]
        if isinstance(value, ConsumedValue) and name not in self._open:
            self._open[name] = value.make_slice()
            filled = whole_pieces(self._open[name], value.placement)
            self._targets |= {(name, piece.offsets): piece.tensor for piece in filled.pieces}
        tensor = self._targets[name, tuple(corner)]
        where = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return tensor.detach()[where]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        name = read_item.dest_index.fqn
        value = self._values[name]
        if isinstance(value, ConsumedValue):
            self._num_left[name] -= 1
            if not self._num_left[name]:
                for piece in value.pieces:
                    del self._targets[name, piece.offsets]
                value.consume(self._open.pop(name))

    def _differences(self, name: str, value: ShardedValue | ConsumedValue) -> Iterator[str]:
        assert name.startswith(self._prefix), f"{name} does not start with {self._prefix}"
        stored = self._stored.get(name)
        if stored is None:
            yield f"{name}: in this model, not in the checkpoint"
        elif tuple(stored.size) != value.global_shape:
            yield f"{name}: shape {list(stored.size)} in the checkpoint, {list(value.global_shape)} in this model"
        elif stored.properties.dtype != value.dtype and not self._converts_dtype:
            yield f"{name}: {stored.properties.dtype} in the checkpoint, {value.dtype} in this model"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"a checkpoint of another model ({first_few(problems)}); "
            "set the model as in the checkpoint's config.toml, or load another checkpoint"
        )


def _boxes(name: str, value: ShardedValue | StreamedValue) -> Iterable[Box]:
    if isinstance(value, StreamedValue):
        return value.boxes
    for piece in value.pieces:
        assert piece.tensor.dtype == value.dtype, f"{name}: a piece of {piece.tensor.dtype} in {value.dtype}"
    return map(Box.of_piece, value.pieces)


def _write_item(name: str, value: ShardedValue | StreamedValue, box: Box) -> WriteItem:
    write = TensorWriteData(box.chunk, TensorProperties(dtype=value.dtype), torch.Size(value.global_shape))
    return WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=write)
