"""The adapters of a checkpoint as a folder to share (`model/adapter_folder.py` lists its files)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.conversion_folder import (
    check_destination,
    conversion_folder,
    misread,
    write_conversion_report,
)
from bitdance_scale.checkpoint.export_card import ShareOptions, adapter_facts
from bitdance_scale.checkpoint.export_release import ExportedRun, run_of
from bitdance_scale.checkpoint.frozen_base import digest_of
from bitdance_scale.checkpoint.published_files import TensorFileWriter, file_digests
from bitdance_scale.checkpoint.run_adapters import RunAdapters
from bitdance_scale.config.published_adapter import ADAPTER_CONFIG_NAME, published_adapter
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.adaptable import HEAD_PREFIX
from bitdance_scale.model.adapter_folder import (
    FACTS_NAME,
    HEAD_ADAPTER_NAME,
    QUERIES_NAME,
    QUERIES_TENSOR,
    TRAINED_PROJECTOR_NAME,
    facts_content,
    tensor_names,
)
from bitdance_scale.model.published_names import Part
from bitdance_scale.sharing.card import CardFacts, write_card
from bitdance_scale.weight_files import TensorSpec


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its shape, and where its values come from."""

    shape: tuple[int, ...]
    part: Part
    read: Callable[[], torch.Tensor]


def export_adapter(
    adapters: RunAdapters,
    out: Path,
    *,
    dtypes: Mapping[Part, str] | None = None,
    options: ShareOptions | None = None,
    is_forced: bool = False,
) -> tuple[ExportedRun, CardFacts]:
    """Writes the adapters of a checkpoint with their card, and reads them back.

    Args:
        adapters: from `open_run_adapters`.
        out: the folder to make.
        dtypes: of the tensors of a part; float32 for the others. Query tokens are the backbone's.
        options: what the user says of them to those with whom they are shared; None: nothing.
        is_forced: whether an earlier conversion there is replaced.

    Returns:
        (the run, and how far it is; what the card says).

    Raises:
        CheckpointError: the run is of a network that PEFT cannot load, or has query tokens that its base lacks; the
            checkpoint is damaged, or the folder cannot be written.
    """
    _check_shareable(adapters)
    files = _files(adapters)
    names = {Part.BACKBONE: "float32", Part.HEAD: "float32", Part.PROJECTOR: "float32"} | dict(dtypes or {})
    specs = {
        file: {name: TensorSpec(tensor.shape, getattr(torch, names[tensor.part])) for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }
    num_bytes = sum(spec.num_bytes for found in specs.values() for spec in found.values())
    check_destination(out, is_forced=is_forced, num_bytes=num_bytes)
    adapters.stored.check_files(adapters.tensor_files())
    run = run_of(adapters.path, adapters.state)
    assert run is not None, "adapters are of a run"
    facts = adapter_facts(adapters, run, options or ShareOptions())
    with conversion_folder(out) as folder:
        digests = {}
        for file, tensors in files.items():
            with TensorFileWriter(folder / file, specs[file]) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor.read().to(specs[file][name].dtype).contiguous())
            digests[file] = writer.digests
            if file_digests(folder / file) != writer.digests:
                raise misread(file)
        _write_texts(adapters, folder, next(iter(facts.base_models), adapters.base.name))
        write_card(folder, facts)
        write_conversion_report(
            folder,
            {
                "source": str(adapters.path),
                "kind": "adapters",
                "step": adapters.state.step,
                "run": vars(run) | {"is_finished": run.is_finished},
                "weights": adapters.weights,
                "version": bitdance_scale.__version__,
                "reloaded": "every tensor, by the SHA-256 of what was written",
                "tensor_sha256": digests,
            },
        )
    return run, facts


def _check_shareable(adapters: RunAdapters) -> None:
    if not adapters.network.model.parts.has_text:
        raise CheckpointError(
            f"{adapters.path}: adapters of a class-conditional network, whose backbone no other program knows; export "
            "it with its adapters merged: --merge"
        )
    if adapters.num_new_queries:
        raise CheckpointError(
            f"{adapters.path}: its run added {adapters.num_new_queries} query tokens, which its base "
            f"({adapters.base.name}) lacks, so that its adapters alone fit no published model; export it with its "
            "adapters merged: --merge"
        )


def _files(adapters: RunAdapters) -> dict[str, dict[str, _Tensor]]:
    """File -> its tensors, in their order."""
    files: dict[str, dict[str, _Tensor]] = {}
    source = adapters.source
    for linear, found in source.matrices.items():
        file, (name_a, name_b) = tensor_names(linear)
        part = Part.HEAD if file == HEAD_ADAPTER_NAME else Part.BACKBONE
        shapes = (found.rank, found.in_size), (found.out_size, found.rank)
        tensors = files.setdefault(file, {})
        tensors[name_a] = _Tensor(shapes[0], part, functools.partial(source.read_a, linear))
        tensors[name_b] = _Tensor(shapes[1], part, functools.partial(source.read_b, linear, 0, found.out_size))
    for name, shape in source.projector.items():
        tensor = _Tensor(shape, Part.PROJECTOR, functools.partial(source.read_projector, name))
        files.setdefault(TRAINED_PROJECTOR_NAME, {})[name] = tensor
    if source.num_queries:
        shape = (source.num_queries, adapters.network.model.hidden_size)
        files[QUERIES_NAME] = {QUERIES_TENSOR: _Tensor(shape, Part.BACKBONE, source.read_queries)}
    return files


def _write_texts(adapters: RunAdapters, folder: Path, base_name: str) -> None:
    """The JSON files: PEFT's, of adapters of the backbone, which names their base, and our own."""
    section, source = adapters.section, adapters.source
    backbone = [*_of_backbone(source.matrices)]
    if backbone:
        content = published_adapter(section, base_name, backbone, adapters.network.model.num_layers)
        _write_json(folder / ADAPTER_CONFIG_NAME, content)
    base = {
        "checkpoint": str(adapters.base.path),
        "checkpoint_digest": digest_of(adapters.base.path),
        "weights": adapters.base.weights,
    }
    content = facts_content(
        rank=section.rank,
        alpha=section.alpha,
        rank_stabilized=section.rank_stabilized,
        source=source,
        base=base,
    )
    _write_json(folder / FACTS_NAME, content)


def _of_backbone(linears: Mapping[str, object]) -> Iterator[str]:
    return (name for name in linears if not name.startswith(HEAD_PREFIX))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
