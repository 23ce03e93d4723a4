"""Files that torch.save wrote, such as the published class-conditional networks: read as tensors, and as nothing else.

A pickle can run any code. These are read with torch's weights-only loading, which builds tensors and plain values and
refuses the rest. The file is memory-mapped and read a few rows at a time. It is mapped again every so often, because
pages that have been read stay in memory.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdance_scale.checkpoint.integrity import find_irregular
from bitdance_scale.checkpoint.published_names import Part, PublishedTensor
from bitdance_scale.errors import CheckpointError
from bitdance_scale.weight_files import TensorSpec, check_tensors, dtype_name, refuse
from bitdance_scale.wording import first_few

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RESIDENT_BYTES = 128 * 2**20
_FETCH = "fetch it again"


class PickledFile:
    """The tensors of a file of torch.save, which holds dictionaries of them by name.

    Args:
        path: the file.

    Attributes:
        path: the file.
        entries: name of a dictionary -> name of a tensor in it -> shape and dtype.
        ignored: names of what else the file holds.

    Raises:
        CheckpointError: there is no such file, it is damaged, of an old format, or needs more than tensors; or a
            dictionary has something in it that is no tensor of weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, TensorSpec]] = {}
        self.ignored: list[str] = []
        _check_archive(path)
        _check_globals(path)
        self._content: Mapping[str, Any] = {}
        self._num_read = 0
        self._open()
        for name, value in self._content.items():
            if isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()):
                self.entries[str(name)] = dict(_specs(path, str(name), value))
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
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path}: cannot be read ({reason}); {_FETCH}") from error
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.path}: holds {type(content).__name__}, expected a dictionary with `model`, `ema` or "
                "`state_dict`"
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


def _check_archive(path: Path) -> None:
    """Refuses what is no archive of torch.save, and one whose bytes are not those that were written."""
    # The user named it, so a link is followed, such as those of Hugging Face's cache.
    problem = find_irregular(path.resolve())
    if problem is not None:
        raise CheckpointError(f"{problem}; name the file itself")
    old = "cut short, or saved by torch before 1.6: load it there and save it again with a newer one"
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(f"{path}: {packed[0]} in it is compressed, which torch.save never does; {_FETCH}")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path}: is no whole file of torch.save ({error}); it is {old}, or {_FETCH}") from error
    except (OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_FETCH}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged: the checksum of {damaged} in it is not that of its content; {_FETCH} (or, if it was "
            "saved with torch.serialization.set_crc32_options(False), save it again with checksums)"
        )


def _check_globals(path: Path) -> None:
    """Refuses a pickle that names classes or functions beyond those of tensors, without running any."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: is no file of weights ({error}); {_FETCH}") from error
    if wanted:
        raise CheckpointError(
            f"{path}: needs {first_few(sorted(wanted))} to be unpickled, which could run any code; only tensors are "
            "read. Where you trust the file, load it with torch.load(FILE, weights_only=False) and save only its "
            'tensors, such as torch.save({"model": content["model"]}, NEW)'
        )


def _specs(path: Path, entry: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, TensorSpec]]:
    problems = []
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{name!r} is {type(value).__name__}, expected a tensor by name")
        elif value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            problems.append(
                f"{name} is a tensor of another kind ({value.layout}, {value.device}), expected a dense one"
            )
        elif value.dtype not in WEIGHT_DTYPES:
            problems.append(
                f"{name} is {dtype_name(value.dtype)}; weights are {', '.join(map(dtype_name, WEIGHT_DTYPES))}"
            )
        else:
            yield name, TensorSpec(tuple(value.shape), value.dtype)
    refuse(Path(f"{path}, `{entry}`"), problems, "Save it again with tensors of weights alone")
