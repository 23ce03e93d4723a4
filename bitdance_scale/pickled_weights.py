"""Files of weights that torch.save wrote: read as tensors, and as nothing else.

A pickle can run any code. These are read with torch's weights-only loading, which builds tensors and plain values and
refuses the rest.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitdance_scale.errors import CheckpointError
from bitdance_scale.weight_files import TensorSpec, check_tensors, dtype_name, find_irregular, read_header, refuse
from bitdance_scale.wording import first_few

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS_SUFFIX = ".safetensors"
_ARCHIVE_START = b"PK\x03\x04"
_FETCH = "fetch it again"


def check_archive(path: Path) -> None:
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


def check_globals(path: Path) -> None:
    """Refuses a pickle that names classes or functions beyond those of tensors, without running any."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: is no file of weights ({error}); {_FETCH}") from error
    if wanted:
        raise CheckpointError(_unsafe(path, first_few(sorted(wanted))))


def _unsafe(path: Path, wanted: str) -> str:
    return (
        f"{path}: needs {wanted} to be unpickled, which could run any code; only tensors are "
        "read. Where you trust the file, load it with torch.load(FILE, weights_only=False) and save only its "
        'tensors, such as torch.save({"model": content["model"]}, NEW)'
    )


def unpickle(path: Path, mmap: bool = True) -> object:
    """What a file of torch.save holds, on the CPU.

    Args:
        path: the file.
        mmap: leaves the tensors in the file until they are used; archives alone can be mapped.

    Raises:
        CheckpointError: it is damaged, or needs more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
    ) as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe is not None:
            raise CheckpointError(_unsafe(path, unsafe[1])) from error
        reason = str(error).splitlines()[0] if isinstance(error, RuntimeError | OSError) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read ({reason}); {_FETCH}") from error


def pickled_specs(where: Path, values: Mapping[Any, Any]) -> Iterator[tuple[str, TensorSpec]]:
    """Shapes and dtypes of a dictionary of tensors, by name.

    Raises:
        CheckpointError: something in it is no dense tensor of weights on the CPU; names `where`.
    """
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
    refuse(where, problems, "Save it again with tensors of weights alone")


class StateFile:
    """The state dict of one network in a file of its own: safetensors, or what torch.save wrote of it.

    Files of torch before 1.6, as some networks are still published, are read as well; they have no checksums.

    Args:
        path: the file; its name ends in .safetensors, or it is one of torch.save.
        has: whether a name is of the part that is read; the rest may be anything.

    Attributes:
        specs: name -> shape and dtype of that part.

    Raises:
        CheckpointError: there is no such file, it is damaged, or holds something else.
    """

    def __init__(self, path: Path, has: Callable[[str], bool] = lambda _: True) -> None:
        self.path = path
        self._content: Mapping[str, Any] | None = None
        if path.suffix == SAFETENSORS_SUFFIX:
            self.specs = {name: spec for name, spec in read_header(path).items() if has(name)}
            return
        problem = find_irregular(path.resolve())
        if problem is not None:
            raise CheckpointError(f"{problem}; name the file itself")
        with path.open("rb") as file:
            is_archive = file.read(len(_ARCHIVE_START)) == _ARCHIVE_START
        if is_archive:
            check_archive(path)
            check_globals(path)
        content = unpickle(path, mmap=is_archive)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path}: holds {type(content).__name__}, expected tensors by name")
        self._content = {name: value for name, value in content.items() if not isinstance(name, str) or has(name)}
        self.specs = dict(pickled_specs(path, self._content))

    def check(self, wanted: Mapping[str, tuple[int, ...]], fix: str) -> None:
        """Compares names and shapes; errors as `check_tensors`."""
        check_tensors(self.path, self.specs, wanted, fix)

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors in float32, in memory of their own.

        Raises:
            CheckpointError: a value is infinite or no number.
        """
        tensors = load_file(self.path) if self._content is None else self._content
        values = {name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in self.specs}
        odd = [f"{name} holds NaN or infinity" for name, value in values.items() if not value.isfinite().all()]
        refuse(self.path, odd, "Fetch it again")
        return values
