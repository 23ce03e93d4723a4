"""Weight files of a published folder (BitDance's release, or a plain Qwen3), read and written some rows at a time.

No tensor is ever whole in memory. The safetensors library writes a file from tensors that are all in memory, so
`TensorFileWriter` writes the format itself: the length of the header, a header of names, dtypes, shapes and offsets as
JSON, then the values in the order of their offsets (https://huggingface.co/docs/safetensors). Files are read with the
library.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from bitdance_scale.checkpoint.integrity import tensor_bytes
from bitdance_scale.checkpoint.tensor_storage import opened
from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.published_layout import RELEASE, PublishedLayout
from bitdance_scale.model.published_names import Part, PublishedTensor
from bitdance_scale.weight_files import (
    TensorSpec,
    check_tensors,
    encode_header,
    read_folder_headers,
    read_header,
    read_single_header,
    refuse,
)

_FIX = "Take all files from one release"
_CHUNK_BYTES = 64 * 2**20


def part_file(part: Part, layout: PublishedLayout) -> str:
    """The file of a part's weights, as a path in a published folder."""
    return {Part.BACKBONE: layout.backbone, Part.HEAD: layout.head, Part.PROJECTOR: layout.projector}[part]


def row_chunks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a tensor that are read at a time: 64 MiB, or one row."""
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def published_rows(
    tensor: PublishedTensor, read: Callable[[str, int, int], torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """Rows start..stop of a published tensor, which may be scattered over ours.

    Args:
        tensor: the tensor.
        read: our tensor, its first row, its last row + 1 -> these rows.
        start: the first row, in its order, of the shape of ours.
        stop: the last row + 1.
    """
    parts, first = [], 0
    for ours, shared in tensor.rows:
        begin, end = max(start, first), min(stop, first + shared.num_rows)
        if begin < end:
            parts.append(read(ours, shared.start + begin - first, shared.start + end - first))
        first += shared.num_rows
    return torch.cat(parts)


def file_digests(path: Path) -> dict[str, str]:
    """Name -> hexadecimal SHA-256 of every tensor in a safetensors file, as the library reads it."""
    digests = {}
    for name, spec in read_header(path).items():
        digest = hashlib.sha256()
        num_rows = spec.shape[0] if spec.num_bytes else 0
        for start, stop in row_chunks(num_rows, spec.num_bytes // max(1, num_rows)):
            digest.update(tensor_bytes(_rows(path, name, start, stop)))
        digests[name] = digest.hexdigest()
    return digests


def _rows(path: Path, name: str, start: int, stop: int) -> torch.Tensor:
    # Opened for each part: what was read of a mapped file stays resident until the file is closed.
    with opened(path, "fetch the folder again") as file:
        rows: torch.Tensor = file.get_slice(name)[start:stop].clone()
    return rows


class PublishedTensors:
    """The tensors of one part of a folder; only headers are read when it is made.

    Args:
        folder: the published folder.
        part: which part.
        layout: where its files are.

    Attributes:
        part: the part.
        found: name -> shape and dtype; without copies (`drop_copy`).
        stored: the same with them.

    Raises:
        CheckpointError: a file is missing or damaged, or holds a dtype that weights do not have.
    """

    def __init__(self, folder: Path, part: Part, layout: PublishedLayout = RELEASE) -> None:
        self.part, self._where = part, folder / part_file(part, layout)
        self.found: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        path = self._where
        may_be_split = part is Part.BACKBONE or layout.has_split_parts
        headers = read_folder_headers(path.parent, path.name) if may_be_split else {path: read_single_header(path)}
        for path, header in headers.items():
            self.found |= header
            self._files |= dict.fromkeys(header, path)
        self.stored = dict(self.found)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors of the part, as `check` makes sure."""
        return next(iter(self.found.values())).dtype

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files[name]

    def check(self, wanted: Mapping[str, PublishedTensor]) -> None:
        """Compares names, shapes and dtypes with those of a network.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or of another dtype than the first.
        """
        where = self._where
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

    def drop_copy(self, name: str, original: str, fix: str) -> None:
        """Leaves out a tensor that must hold the values of another one, after comparing them.

        Raises:
            CheckpointError: shape, dtype or a value differs; ends with `fix`.
        """
        where, copy, kept = self.file(name), self.found[name], self.found[original]
        if copy != kept:
            raise CheckpointError(
                f"{where}: {name} is {copy.dtype} {list(copy.shape)} and {original} is {kept.dtype} "
                f"{list(kept.shape)}; {fix}"
            )
        for start, stop in row_chunks(kept.shape[0], kept.num_bytes // max(1, kept.shape[0])):
            rows = [tensor_bytes(self.read_rows(each, start, stop)) for each in (name, original)]
            if rows[0] != rows[1]:
                raise CheckpointError(
                    f"{where}: {name} has other values than {original} (in rows {start} to {stop - 1}); {fix}"
                )
        del self.found[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (elements of a vector) start..stop of a tensor, in its dtype, in memory of their own."""
        return _rows(self._files[name], name, start, stop)

    def rows_of(self, name: str) -> Callable[[int, int], torch.Tensor]:
        """`read_rows` of one tensor."""
        return functools.partial(self.read_rows, name)


class TensorFileWriter:
    """A safetensors file under construction; a context manager.

    The file is written in place and not forced to storage: it is part of a folder that is renamed as a whole
    (`conversion_folder`).

    Args:
        path: the file; must not exist.
        specs: the tensors, in the order in which they are written.

    Attributes:
        path: the file.
        digests: name -> hexadecimal SHA-256 of the tensor's bytes, for the tensors that are complete.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        self._specs = dict(specs)
        self._waiting = list(specs)
        self._digest = hashlib.sha256()
        self._num_written = 0

    def __enter__(self) -> TensorFileWriter:
        self._file = self.path.open("xb")
        self._file.write(encode_header(self._specs))
        return self

    def write(self, name: str, values: torch.Tensor) -> None:
        """Appends values to the tensor whose turn it is.

        Args:
            name: the tensor.
            values: its next elements in row-major order; contiguous, on the CPU, of the tensor's dtype.
        """
        assert self._waiting and self._waiting[0] == name, f"{name} is not the tensor whose turn it is"
        spec = self._specs[name]
        assert values.dtype == spec.dtype and values.is_contiguous(), f"{name}: {values.dtype} for {spec.dtype}"
        content = tensor_bytes(values)
        self._file.write(content)
        self._digest.update(content)
        self._num_written += content.nbytes
        assert self._num_written <= spec.num_bytes, f"{name}: more values than its shape holds"
        if self._num_written == spec.num_bytes:
            self.digests[name] = self._digest.hexdigest()
            self._waiting.pop(0)
            self._digest, self._num_written = hashlib.sha256(), 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            assert kind is not None or not self._waiting, f"{self.path}: {self._waiting[0]} is not whole"
