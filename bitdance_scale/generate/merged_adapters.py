"""Adapters in the weights of a published folder that is being loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.generate.published_layout import PublishedLayout
from bitdance_scale.model.adapter_changes import AdapterChanges
from bitdance_scale.model.adapter_source import WeightedAdapter, check_base, fingerprint
from bitdance_scale.model.published_names import Part
from bitdance_scale.weight_files import read_folder_headers

# A Qwen3 without its output projection has its parameters without this.
_MODEL = "model."


class _FolderRows:
    """Rows of the tensors of a published folder."""

    def __init__(self, folder: Path, layout: PublishedLayout) -> None:
        files = {Part.BACKBONE: layout.backbone, Part.HEAD: layout.head, Part.PROJECTOR: layout.projector}
        self._paths = {
            (part, name): path
            for part, file in files.items()
            for path, header in read_folder_headers((folder / file).parent, Path(file).name).items()
            for name in header
        }

    def read(self, part: Part, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor, in its dtype."""
        with safe_open(self._paths[part, name], framework="pt") as file:
            rows: torch.Tensor = file.get_slice(name)[start:stop].clone()
        return rows


def check_adapters(
    adapters: Sequence[WeightedAdapter],
    folder: Path,
    layout: PublishedLayout,
    network: NetworkConfig,
    vocab_size: int,
) -> None:
    """Compares the weights that adapters were trained beside with those of a published folder.

    Raises:
        CheckpointError: they are others.
    """
    if all(adapter.source.base is None for adapter in adapters):
        return
    rows = _FolderRows(folder, layout)
    found = fingerprint(network, vocab_size, lambda part, name, num_rows: rows.read(part, name, 0, num_rows))
    for adapter in adapters:
        check_base(adapter.source, found, str(folder))


def merge(
    changes: AdapterChanges | None, folder: Path, layout: PublishedLayout, parts: Mapping[Part, nn.Module]
) -> None:
    """Merges adapters into the parameters of loaded parts.

    What is merged are the values of the files, so that the parts are those of a folder that `bitdance export --merge`
    makes, bit for bit.

    Args:
        changes: what the adapters change; None: nothing.
        folder: where the parts were loaded from.
        layout: of its files.
        parts: what is loaded, in any dtype, on any device.

    Raises:
        CheckpointError: adapters are damaged.
    """
    if changes is None:
        return
    rows = _FolderRows(folder, layout)
    for part, module in parts.items():
        for name in changes.names(part):
            parameter = module.get_parameter(name.removeprefix(_MODEL) if part is Part.BACKBONE else name)
            first = 0
            blocks = changes.blocks(part, name, lambda start, stop: rows.read(part, name, start, stop))  # noqa: B023
            for values in blocks:
                parameter.data[first : first + len(values)].copy_(values)
                first += len(values)
