"""The tensors of a published folder, read part by part (BitDance's release, or a plain Qwen3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bitdance_scale.checkpoint.published_names import Part, PublishedTensor
from bitdance_scale.checkpoint.tensor_storage import opened
from bitdance_scale.weight_files import TensorSpec, check_tensors, read_folder_headers, refuse

PART_FILES: Mapping[Part, str] = {
    Part.BACKBONE: "model.safetensors",
    Part.HEAD: "vision_head.safetensors",
    Part.PROJECTOR: "projector.safetensors",
}
_FIX = "Take all files from one release"
_CHUNK_BYTES = 64 * 2**20


def row_chunks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of parts of a tensor of so many rows, which are read one at a time: 64 MiB each, or one row."""
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


class PublishedTensors:
    """The tensors of one part of a folder; only headers are read when it is made.

    Args:
        folder: the published folder.
        part: whose files are read.

    Attributes:
        found: name -> shape and dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or holds a dtype that weights do not have.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.part, self._folder = part, folder
        self.found: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        for path, header in read_folder_headers(folder, PART_FILES[part]).items():
            self.found |= header
            self._files |= dict.fromkeys(header, path)

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of the part; `check` has seen that it has one."""
        return next(iter(self.found.values())).dtype

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files[name]

    def check(self, wanted: Mapping[str, PublishedTensor]) -> None:
        """Compares names, shapes and dtypes with those of a network.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or of another dtype than the first.
        """
        where = self._folder / PART_FILES[self.part]
        check_tensors(where, self.found, {name: tensor.shape for name, tensor in wanted.items()}, _FIX)
        refuse(
            where,
            [
                f"{name} is {spec.dtype}, expected {self.dtype} as the first tensor of the part has"
                for name, spec in self.found.items()
                if spec.dtype != self.dtype
            ],
            "A part has one dtype",
        )

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (elements of a vector) start..stop of a tensor, in its dtype, in memory of their own."""
        # Opened for each part: what a mapping has touched stays resident until it is closed.
        with opened(self._files[name], "fetch the folder again") as file:
            return file.get_slice(name)[start:stop].clone()
