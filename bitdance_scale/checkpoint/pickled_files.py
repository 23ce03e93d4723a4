"""Dictionaries of tensors in a file that torch.save wrote, such as the published class-conditional networks.

They are read as `pickled_weights.py` says: as tensors, and as nothing else. The file is memory-mapped and read a few
rows at a time. It is mapped again every so often, because pages that have been read stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.published_names import Part, PublishedTensor
from bitdance_scale.pickled_weights import check_archive, check_globals, pickled_specs, unpickle
from bitdance_scale.weight_files import TensorSpec, check_tensors, dtype_name, refuse

TRAINED_ENTRY, AVERAGED_ENTRY = "model", "ema"
"""The dictionaries of a published class-conditional file: its weights and their averages."""
STATE_ENTRY = "state_dict"
"""The dictionary with the weights in a published autoencoder's file."""
_READ_ENTRIES = (TRAINED_ENTRY, AVERAGED_ENTRY, STATE_ENTRY)
_MAX_RESIDENT_BYTES = 128 * 2**20


class PickledFile:
    """The tensors of a file of torch.save, which holds dictionaries of them by name: `model`, `ema` or `state_dict`.

    Args:
        path: the file.

    Attributes:
        path: the file.
        entries: name of a dictionary -> name of a tensor in it -> shape and dtype.
        ignored: names of what else the file holds, such as the state of an optimiser.

    Raises:
        CheckpointError: there is no such file, it is damaged, of an old format, or needs more than tensors; or one of
            these dictionaries has something in it that is no tensor of weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, TensorSpec]] = {}
        self.ignored: list[str] = []
        check_archive(path)
        check_globals(path)
        self._content: Mapping[str, Any] = {}
        self._num_read = 0
        self._open()
        for name, value in self._content.items():
            has_tensors = isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())
            if has_tensors and name in _READ_ENTRIES:
                self.entries[name] = dict(pickled_specs(Path(f"{path}, `{name}`"), value))
            else:
                self.ignored.append(str(name))

    def read_rows(self, entry: str, name: str, row_shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor, seen as rows of `row_shape`, in its dtype, in memory of their own."""
        if self._num_read > _MAX_RESIDENT_BYTES:
            self._open()
        rows: torch.Tensor = self._content[entry][name].detach().reshape(-1, *row_shape)[start:stop].clone()
        self._num_read += rows.nbytes
        return rows

    def _open(self) -> None:
        # The old mapping goes first.
        self._content, self._num_read = {}, 0
        content = unpickle(self.path)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.path}: holds {type(content).__name__}, expected a dictionary with `{TRAINED_ENTRY}`, "
                f"`{AVERAGED_ENTRY}` or `{STATE_ENTRY}`"
            )
        self._content = content


class PickledTensors:
    """The tensors of one part of a network in a dictionary of a file; `PublishedTensors` is the same for folders.

    Args:
        source: the file.
        entry: the dictionary.
        part: which part.
        has: whether a name is of this part.
        prefix: what the names begin with in the file and not here.

    Attributes:
        part: the part.
        found: name -> shape and dtype.
    """

    def __init__(
        self,
        source: PickledFile,
        entry: str,
        part: Part | None = None,
        has: Callable[[str], bool] = lambda _: True,
        prefix: str = "",
    ) -> None:
        self.part, self._source, self._entry, self._prefix = part, source, entry, prefix
        self.found = {
            name.removeprefix(prefix): spec
            for name, spec in source.entries[entry].items()
            if name.startswith(prefix) and has(name)
        }
        self._row_shapes: dict[str, tuple[int, ...]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors of the part, as `check` makes sure."""
        return next(iter(self.found.values())).dtype

    @property
    def where(self) -> Path:
        """The file and the dictionary in it, for messages."""
        return Path(f"{self._source.path}, `{self._entry}`")

    def check(self, wanted: Mapping[str, PublishedTensor], fix: str = "Fetch the file again") -> None:
        """Compares names, shapes and dtypes with those of a network.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or of another dtype than the first; ends
                with `fix`.
        """
        check_tensors(self.where, self.found, {name: tensor.shape for name, tensor in wanted.items()}, fix)
        problems = [
            f"{self._prefix}{name} is {dtype_name(spec.dtype)}, expected {dtype_name(self.dtype)} as the first tensor "
            f"of the {self.part} has"
            for name, spec in self.found.items()
            if spec.dtype != self.dtype
        ]
        refuse(self.where, problems, "A part has one dtype")
        self._row_shapes = {name: tensor.row_shape for name, tensor in wanted.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor, in its dtype, in memory of their own; rows are those of our tensors.

        Raises:
            CheckpointError: a value is infinite or no number.
        """
        row_shape = self._row_shapes.get(name, self.found[name].shape[1:])
        rows = self._source.read_rows(self._entry, self._prefix + name, row_shape, start, stop)
        if not rows.isfinite().all():
            raise CheckpointError(
                f"{self.where}: {self._prefix}{name} holds NaN or infinity; no image can be drawn with it. Name the "
                "file of an earlier step"
            )
        return rows
