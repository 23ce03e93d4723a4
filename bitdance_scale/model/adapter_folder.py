"""A folder of adapters, as `bitdance export` writes it of a run, and as PEFT writes it of a Qwen3 that it trained.

    adapter_config.json, adapter_model.safetensors     the backbone's, in PEFT's form (`published_adapter.py`)
    head_adapter.safetensors                            of linears of the head, by their published names
    projector.safetensors                               the projector, where it was trained too
    query_tokens.safetensors                            what was added to the embeddings of the query tokens
    bitdance_adapter.json                               rank, scale, and what they were trained beside

PEFT writes the first two alone, and says of the base no more than its name. Only safetensors and JSON are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdance_scale.config.published_adapter import ADAPTER_CONFIG_NAME, AdapterScales, read_adapter
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.adaptable import HEAD_PREFIX
from bitdance_scale.model.adapter_source import AdapterSource, BaseFacts, Matrices, check_finite
from bitdance_scale.weight_files import TensorSpec, find_irregular, read_json, read_single_header

FACTS_NAME = "bitdance_adapter.json"
FACTS_VERSION = 1
BACKBONE_ADAPTER_NAME = "adapter_model.safetensors"
HEAD_ADAPTER_NAME = "head_adapter.safetensors"
TRAINED_PROJECTOR_NAME = "projector.safetensors"
QUERIES_NAME = "query_tokens.safetensors"
QUERIES_TENSOR = "query_deltas.weight"
PEFT_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_MODEL = "model."
_FIX = "export or fetch the adapters again"


def is_adapter_folder(folder: Path) -> bool:
    """Whether a path is a folder of adapters."""
    return (folder / FACTS_NAME).is_file() or (folder / ADAPTER_CONFIG_NAME).is_file()


def tensor_names(linear: str) -> tuple[str, tuple[str, str]]:
    """The file of a linear's matrices and their names in it, A and B; the linear as in `AdaptableLinear.name`."""
    if linear.startswith(HEAD_PREFIX):
        name = linear.removeprefix(HEAD_PREFIX)
        return HEAD_ADAPTER_NAME, (name + _SUFFIXES[0], name + _SUFFIXES[1])
    return BACKBONE_ADAPTER_NAME, (PEFT_PREFIX + linear + _SUFFIXES[0], PEFT_PREFIX + linear + _SUFFIXES[1])


def open_adapter_folder(folder: Path) -> AdapterSource:
    """Checks a folder of adapters; reads headers alone.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; it holds more than low-rank matrices, as
            DoRA does; names file, key or tensor, and the reason.
    """
    if not is_adapter_folder(folder):
        raise CheckpointError(
            f"{folder}: holds no adapters ({FACTS_NAME} or {ADAPTER_CONFIG_NAME}); name a folder that `bitdance "
            "export` made of a run with adapters, or one that PEFT wrote"
        )
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".json") and (problem := find_irregular(path)) is not None:
            raise CheckpointError(f"{problem}. Fetch the folder again, with files in it instead of links")
    facts = _read_facts(folder) if (folder / FACTS_NAME).is_file() else None
    files = _Files(folder, facts)
    matrices = {name: _matrices(name, pair) for name, pair in files.pairs.items()}
    if facts is not None:
        _check_listed(folder, facts, files)
    return AdapterSource(
        where=str(folder),
        matrices=matrices,
        projector={name: spec.shape for name, spec in files.projector.items()},
        num_queries=files.num_queries,
        base=None if facts is None else facts.base,
        read_a=lambda name: files.read(name, 0),
        read_b=lambda name, start, stop: files.read(name, 1, start, stop),
        read_projector=lambda name: _read(folder / TRAINED_PROJECTOR_NAME, name),
        read_queries=lambda: _read(folder / QUERIES_NAME, QUERIES_TENSOR),
    )


@dataclass(frozen=True)
class _Facts:
    """What `bitdance_adapter.json` says: scales, base, and what must be in the folder."""

    scales: AdapterScales
    base: BaseFacts
    linears: frozenset[str]
    has_projector: bool
    has_queries: bool


def _read_facts(folder: Path) -> _Facts:
    path = folder / FACTS_NAME
    content = read_json(path)
    if content.get("version") != FACTS_VERSION:
        raise CheckpointError(
            f"{path}: version {content.get('version')!r}, this program reads version {FACTS_VERSION}; use the program "
            "that wrote it"
        )
    try:
        base = content["base"]
        scales = read_adapter(
            {"peft_type": "LORA", "r": content["rank"], "lora_alpha": content["alpha"]}
            | {"use_rslora": content["rank_stabilized"]},
            str(path),
        )
        return _Facts(
            scales,
            BaseFacts(str(base["name"]), dict(base["sizes"]), dict(base["fingerprint"])),
            frozenset(content["linears"]),
            bool(content["has_projector"]),
            bool(content["has_queries"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}); {_FIX}") from error


@dataclass(frozen=True)
class _Pair:
    """The two matrices of a linear.

    Attributes:
        path: their file.
        names: of A and B in it.
        specs: shape and dtype of A and B.
        rank: that the configuration says.
        scale: likewise.
    """

    path: Path
    names: tuple[str, str]
    specs: tuple[TensorSpec, TensorSpec]
    rank: int
    scale: float


class _Files:
    """The headers of a folder."""

    def __init__(self, folder: Path, facts: _Facts | None) -> None:
        self.pairs: dict[str, _Pair] = {}
        self.projector: dict[str, TensorSpec] = {}
        self.num_queries = 0
        config = folder / ADAPTER_CONFIG_NAME
        if facts is None or config.is_file() or (folder / BACKBONE_ADAPTER_NAME).is_file():
            scales = read_adapter(read_json(config), str(config))
            self._check_scales(config, scales, facts)
            self.pairs |= _pairs(folder / BACKBONE_ADAPTER_NAME, scales)
        if facts is None:
            return
        if (folder / HEAD_ADAPTER_NAME).is_file():
            self.pairs |= _pairs(folder / HEAD_ADAPTER_NAME, facts.scales)
        if facts.has_projector:
            self.projector = read_single_header(folder / TRAINED_PROJECTOR_NAME)
        if facts.has_queries:
            header = read_single_header(folder / QUERIES_NAME)
            if [*header] != [QUERIES_TENSOR] or len(header[QUERIES_TENSOR].shape) != 2:
                raise CheckpointError(f"{folder / QUERIES_NAME}: must hold {QUERIES_TENSOR} [queries, D] alone; {_FIX}")
            self.num_queries = header[QUERIES_TENSOR].shape[0]

    def read(self, linear: str, number: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of A (0) or B (1) of a linear."""
        pair = self.pairs[linear]
        return _read(pair.path, pair.names[number], start, stop)

    def _check_scales(self, config: Path, scales: AdapterScales, facts: _Facts | None) -> None:
        if facts is not None and scales != facts.scales:
            raise CheckpointError(
                f"{config}: r, lora_alpha or use_rslora is another than {FACTS_NAME} has; take both files from one "
                "export"
            )


def _pairs(path: Path, scales: AdapterScales) -> Mapping[str, _Pair]:
    """Linear -> its matrices, of a file."""
    header = read_single_header(path)
    is_head = path.name == HEAD_ADAPTER_NAME
    found: dict[str, dict[int, str]] = {}
    for name in header:
        number = next((number for number, suffix in enumerate(_SUFFIXES) if name.endswith(suffix)), None)
        is_named = is_head or name.startswith(PEFT_PREFIX)
        if number is None or not is_named:
            raise CheckpointError(
                f"{path}: {name} is no lora_A or lora_B of a linear, and only those are read; merge the adapters into "
                "their base with the program that wrote them, and import that"
            )
        linear = name.removesuffix(_SUFFIXES[number])
        if is_head:
            linear = HEAD_PREFIX + linear
        else:
            linear = linear.removeprefix(PEFT_PREFIX)
            # A Qwen3 without its output projection has no such beginning.
            linear = linear if linear.startswith(_MODEL) else _MODEL + linear
        found.setdefault(linear, {})[number] = name
    for linear, names in found.items():
        if len(names) != len(_SUFFIXES):
            raise CheckpointError(f"{path}: {linear} has {next(iter(names.values()))} alone; {_FIX}")
    return {
        linear: _Pair(
            path,
            (names[0], names[1]),
            (header[names[0]], header[names[1]]),
            scales.rank_of(linear),
            scales.scale_of(linear),
        )
        for linear, names in found.items()
    }


def _matrices(linear: str, pair: _Pair) -> Matrices:
    """What is known of a linear's adapter; refuses shapes that are not those of two low-rank matrices."""
    a, b = (spec.shape for spec in pair.specs)
    if len(a) != 2 or len(b) != 2 or a[0] != pair.rank or b[1] != pair.rank:
        raise CheckpointError(
            f"{pair.path}: the matrices of {linear} are {list(a)} and {list(b)}; rank {pair.rank} makes them "
            f"[{pair.rank}, in] and [out, {pair.rank}]. Take all files from one folder"
        )
    return Matrices(pair.rank, b[0], a[1], pair.scale)


def _check_listed(folder: Path, facts: _Facts, files: _Files) -> None:
    """Whether a folder has the linears that it says."""
    odd = sorted(facts.linears ^ {*files.pairs})
    if odd:
        has = "in the files, not" if odd[0] in files.pairs else "not in the files, but"
        raise CheckpointError(f"{folder}: {odd[0]} is {has} in {FACTS_NAME}; {_FIX}")


def _read(path: Path, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows of a tensor, in memory of their own."""
    try:
        with safe_open(path, framework="pt") as file:
            values: torch.Tensor = file.get_slice(name)[start:stop].clone()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_FIX}") from error
    return check_finite(values, f"{path}: {name}")


def facts_content(
    *, rank: int, alpha: float, rank_stabilized: bool, source: AdapterSource, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `bitdance_adapter.json`; `base` is what else it says of the base."""
    facts = source.base
    assert facts is not None, "a run knows its base"
    return {
        "version": FACTS_VERSION,
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": rank_stabilized,
        "linears": sorted(source.matrices),
        "has_projector": bool(source.projector),
        "has_queries": source.num_queries > 0,
        "base": {"name": facts.name, **base, "sizes": dict(facts.sizes), "fingerprint": dict(facts.fingerprint)},
    }
