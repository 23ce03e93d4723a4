"""Writing a safetensors file piece by piece, so that no tensor of it need be whole in memory.

The library writes a file from tensors that are all at hand. The format itself is simple: the header's length as 8 bytes,
little-endian, a header of names, dtypes, shapes and offsets as JSON, then the values in the order of their offsets
(https://huggingface.co/docs/safetensors). Files are read back with the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from bitdance_scale.weight_files import DTYPE_NAMES, TensorSpec

_LENGTH_BYTES = 8
# Where values begin, as the library aligns them.
_ALIGNMENT_BYTES = 8


class TensorFileWriter:
    """A safetensors file under construction; a context manager, which forces the file to storage at its end.

    Args:
        path: the file; must not exist.
        specs: the tensors, in the order in which they are written.

    Attributes:
        digests: name -> hexadecimal SHA-256 of the tensor's bytes, of those written whole.
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
        self._file.write(_header(self._specs))
        return self

    def write(self, name: str, values: torch.Tensor) -> None:
        """Appends values to the tensor whose turn it is.

        Args:
            name: which it is.
            values: contiguous, on the CPU, of the tensor's dtype: its next elements in row-major order.
        """
        assert self._waiting and self._waiting[0] == name, f"{name} is not the tensor whose turn it is"
        spec = self._specs[name]
        assert values.dtype == spec.dtype and values.is_contiguous(), f"{name}: {values.dtype} for {spec.dtype}"
        content = memoryview(values.view(-1).view(torch.uint8).numpy())
        self._file.write(content)
        self._digest.update(content)
        self._num_written += len(content)
        assert self._num_written <= spec.num_bytes, f"{name}: more values than its shape holds"
        if self._num_written == spec.num_bytes:
            self.digests[name] = self._digest.hexdigest()
            self._waiting.pop(0)
            self._digest, self._num_written = hashlib.sha256(), 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert not self._waiting, f"{self.path}: {self._waiting[0]} is not whole"
                self._file.flush()
                os.fsync(self._file.fileno())


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    # transformers refuses a file that does not say which framework it is for.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        stop = start + spec.num_bytes
        dtype = DTYPE_NAMES[spec.dtype]
        entries[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
