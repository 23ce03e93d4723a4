"""Reading parts of a checkpoint's tensors without an engine, wherever their boxes lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.digest import find_change
from bitdance_scale.checkpoint.tensor_index import StoredFile, box_key, read_index
from bitdance_scale.checkpoint.tensor_storage import opened
from bitdance_scale.errors import CheckpointError


class StoredTensors:
    """The tensors of one checkpoint.

    Args:
        folder: its `tensors/`.

    Raises:
        CheckpointError: its index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = read_index(folder)

    def __contains__(self, name: str) -> bool:
        return name in self.index.state_dict_metadata

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self.index.state_dict_metadata[name].properties.dtype

    def files(self, names: Iterable[str]) -> list[StoredFile]:
        """The files that hold anything of these tensors, each once."""
        wanted = set(names)
        return sorted({file for box, file in self.index.storage_data.items() if box.fqn in wanted})

    def check(self, file: StoredFile) -> None:
        """Compares a file with what was written.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        damage = find_change(self._folder / file.name, file.num_bytes, file.sha256)
        if damage is not None:
            raise CheckpointError(f"{damage}; convert another checkpoint")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (elements of a vector) start..stop of a tensor, in its dtype, in memory of their own."""
        tensor = self.index.state_dict_metadata[name]
        shape = tuple(tensor.size)
        wanted = Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
        values = torch.empty(wanted.sizes, dtype=tensor.properties.dtype)
        for chunk in tensor.chunks:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            common = box.intersect(wanted)
            if common is None:
                continue
            index = MetadataIndex(name, chunk.offsets)
            # Opened for each part: what a mapping has touched stays resident until it is closed.
            with opened(self._folder / self.index.storage_data[index].name) as file:
                values[common.slices_in(wanted)] = file.get_slice(box_key(index))[common.slices_in(box)]
        return values
