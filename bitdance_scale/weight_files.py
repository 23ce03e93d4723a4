"""Files of weights and the JSON beside them: what is in them, and whether a network can load it.

Only safetensors and JSON are read. Everything is checked from the headers, so that nothing large is loaded before it is
known to fit.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from bitdance_scale.errors import CheckpointError
from bitdance_scale.text_files import read_utf8
from bitdance_scale.wording import first_few

BACKBONE_WEIGHTS_NAME = "model.safetensors"
"""Backbone of a published folder; large ones are in several files with an index beside them."""
HEAD_WEIGHTS_NAME = "vision_head.safetensors"
PROJECTOR_WEIGHTS_NAME = "projector.safetensors"
INDEX_SUFFIX = ".index.json"
"""Ends the name of the file that says which of several files a tensor is in."""

HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, little-endian, in so many bytes."""
SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names of dtypes in safetensors headers."""
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Of the values of a safetensors file.
_ALIGNMENT_BYTES = 8
_WEIGHT_DTYPES = ("F32", "BF16", "F16")
_FIX = "fetch or export it again"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""How the names of files that must be unpickled end."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in configuration files, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def encode_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """The beginning of a safetensors file whose tensors follow in the order of `specs`, without gaps."""
    # transformers refuses a file that does not say which framework it is for.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        stop = start + spec.num_bytes
        entries[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors in a safetensors file, by name.

    Raises:
        CheckpointError: there is no such file, it is damaged or empty, or it holds a dtype that weights do not have.
    """
    if not path.is_file():
        pickled = [other.name for other in sorted(path.parent.glob("*")) if other.suffix in PICKLED_SUFFIXES]
        beside = f" (not {first_few(pickled)}, which must be unpickled)" if pickled else ""
        raise CheckpointError(f"{path}: there is no such file, and only safetensors are read{beside}; {_FIX}")
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the library's handle is no mapping)
                entry = file.get_slice(name)
                if entry.get_dtype() not in _WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is {entry.get_dtype()}; weights are {', '.join(_WEIGHT_DTYPES)}"
                    )
                specs[name] = TensorSpec(tuple(entry.get_shape()), SAFETENSORS_DTYPES[entry.get_dtype()])
    except (OSError, SafetensorError) as error:
        fix = f"make one of it with `bitdance import {path} OUT`" if path.suffix in PICKLED_SUFFIXES else _FIX
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); {fix}") from error
    if not specs:
        raise CheckpointError(f"{path}: holds no tensor; {_FIX}")
    return specs


def read_folder_headers(folder: Path, name: str) -> dict[Path, dict[str, TensorSpec]]:
    """The tensors of a model that is saved in one file, or in several with an index, as transformers does.

    Args:
        folder: the folder.
        name: name of the one file; the index is named the same with `.index.json` at the end.

    Returns:
        Path -> what is in it.

    Raises:
        CheckpointError: as `read_header`; or the index is damaged, names a file that is not in the folder, or does not
            agree with the files; or the one file is beside an index of others, so that it is not clear which counts.
    """
    index, whole = folder / (name + INDEX_SUFFIX), folder / name
    if not index.is_file():
        return {whole: read_header(whole)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, which names the file of every tensor; {_FIX}")
    listed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: {tensor} is in {file!r}, which is no name of a file in this folder; {_FIX}"
            )
        listed.setdefault(file, set()).add(tensor)
    if whole.is_file() and [*listed] != [name]:
        # transformers reads the one file and not the index.
        raise CheckpointError(
            f"{folder}: holds {name} and {index.name}, which names other files ({first_few(sorted(listed))}): one of "
            f"them is left from another download or model. Remove {name} or {index.name}, whichever is old"
        )
    headers = {}
    for file, names in sorted(listed.items()):
        if not (folder / file).is_file():
            raise CheckpointError(f"{index}: names {file}, and there is no such file in the folder; {_FIX}")
        found = headers[folder / file] = read_header(folder / file)
        if odd := sorted({*found} ^ names):
            has = "in the file, not" if odd[0] in found else "not in the file, but"
            raise CheckpointError(f"{folder / file}: {odd[0]} is {has} in {index.name}; {_FIX}")
    return headers


def find_irregular(path: Path) -> str | None:
    """Why a path is no file to read, naming it; None for a regular file.

    A checkpoint may come from someone else. A symbolic link in it could name any file of this machine, and a pipe or a
    device would be waited for.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return f"{path} is missing"
    if stat.S_ISLNK(mode):
        return f"{path} is a symbolic link, which is not followed inside a checkpoint; put the file itself there"
    return None if stat.S_ISREG(mode) else f"{path} is no regular file"


def read_single_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a part that is always in one file, as all parts of a release but the backbone are.

    Raises:
        CheckpointError: as `read_header`; or an index beside the file names others.
    """
    index = path.with_name(path.name + INDEX_SUFFIX)
    headers = read_folder_headers(path.parent, path.name) if path.is_file() or not index.is_file() else {}
    if [*headers] != [path]:
        raise CheckpointError(f"{index}: this part of a model is read from one file, {path.name}; join its files to it")
    return headers[path]


def check_tensors(where: Path, found: Mapping[str, TensorSpec], wanted: Mapping[str, Sequence[int]], fix: str) -> None:
    """Compares tensors with the names and shapes that a network needs.

    Raises:
        CheckpointError: they differ; names `where`, the first three differences and `fix`.
    """
    problems = [f"{name} is missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [f"{name} is no tensor of this network" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    refuse(where, problems, fix)


def refuse(where: Path, problems: Sequence[str], fix: str) -> None:
    """Raises CheckpointError if there are problems, naming the first three."""
    if problems:
        raise CheckpointError(f"{where}: {first_few(problems)}. {fix}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; {_FIX}")
    try:
        content = json.loads(read_utf8(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); {_FIX}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object; {_FIX}")
    return content
