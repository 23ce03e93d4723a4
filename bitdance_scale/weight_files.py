"""Files of weights and the JSON beside them: what is in them, and whether it is what a network needs.

Only safetensors and JSON are read. A header says everything that is checked, so that nothing large is loaded before it
is known to fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from bitdance_scale.errors import CheckpointError

DTYPE_NAMES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_NAMED_FAULTS = 3
_REMEDY = "fetch or export it again"


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors in a safetensors file, by name.

    Raises:
        CheckpointError: there is no such file, it is damaged or empty, or holds a dtype that weights do not have.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file, and only safetensors are read; {_REMEDY}")
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the library's handle is no mapping)
                entry = file.get_slice(name)
                dtype = _DTYPES.get(entry.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is {entry.get_dtype()}; weights are {', '.join(_DTYPES)}")
                specs[name] = TensorSpec(tuple(entry.get_shape()), dtype)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); {_REMEDY}") from error
    if not specs:
        raise CheckpointError(f"{path}: holds no tensor; {_REMEDY}")
    return specs


def read_folder_headers(folder: Path, name: str) -> dict[Path, dict[str, TensorSpec]]:
    """The files of weights that may lie in one file or in several with an index, as transformers saves them.

    Args:
        folder: the folder.
        name: of the one file; the index is called the same and `.index.json`.

    Returns:
        Path -> what is in it.

    Raises:
        CheckpointError: as `read_header`; or the index is damaged, leads out of the folder or does not say what is in
            the files.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return {folder / name: read_header(folder / name)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, which names the file of every tensor; {_REMEDY}")
    listed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {tensor} is in {file!r}, which is no name of a file in this folder")
        listed.setdefault(file, set()).add(tensor)
    headers = {}
    for file, names in sorted(listed.items()):
        found = headers[folder / file] = read_header(folder / file)
        if odd := sorted({*found} ^ names):
            has = "in the file, not" if odd[0] in found else "not in the file, but"
            raise CheckpointError(f"{folder / file}: {odd[0]} is {has} in {index.name}; {_REMEDY}")
    return headers


def check_tensors(where: Path, found: Mapping[str, TensorSpec], wanted: Mapping[str, Sequence[int]], fix: str) -> None:
    """Compares tensors with the names and shapes that a network needs.

    Raises:
        CheckpointError: they differ; names `where`, the first three faults and `fix`.
    """
    faults = [f"{name} is missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    faults += [f"{name} is no tensor of this network" for name in found if name not in wanted]
    faults += [
        f"{name} has shape {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    refuse(where, faults, fix)


def refuse(where: Path, faults: Sequence[str], fix: str) -> None:
    """Raises CheckpointError if there are faults, naming the first three."""
    if faults:
        more = f" and {len(faults) - _MAX_NAMED_FAULTS} more" if len(faults) > _MAX_NAMED_FAULTS else ""
        raise CheckpointError(f"{where}: {'; '.join(faults[:_MAX_NAMED_FAULTS])}{more}. {fix}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or no object in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; {_REMEDY}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object; {_REMEDY}")
    return content
