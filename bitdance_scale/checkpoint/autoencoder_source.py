"""The autoencoder that an import brings: the published folder's two files, or the tensors in a file of torch.save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.conversion_folder import (
    check_destination,
    conversion_folder,
    misread,
    write_conversion_report,
)
from bitdance_scale.checkpoint.integrity import file_digest
from bitdance_scale.checkpoint.pickled_files import STATE_ENTRY, PickledFile, PickledTensors
from bitdance_scale.checkpoint.published_files import TensorFileWriter, file_digests, row_chunks
from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.published_layout import RELEASE, PublishedLayout, read_part
from bitdance_scale.vision.autoencoder import Autoencoder, deduced_sizes, published_config, published_sizes
from bitdance_scale.vision.weights import CONFIG_NAME, WEIGHTS_NAME, check_weights, config_beside
from bitdance_scale.weight_files import PICKLED_SUFFIXES, check_tensors, read_json
from bitdance_scale.wording import first_few


class AutoencoderSource(Protocol):
    """An autoencoder to import, checked."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `Autoencoder`."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        ...

    def write(self, folder: Path) -> None:
        """Writes `ae.safetensors` and `ae_config.json` into a folder that is being made."""
        ...


@dataclass(frozen=True)
class AutoencoderFiles:
    """A weights file with its configuration.

    Attributes:
        weights: the safetensors file.
        sizes: the keyword arguments of `Autoencoder`.
        config: the configuration file, where it is written as it is; None: from the sizes.
    """

    weights: Path
    sizes: dict[str, Any]
    config: Path | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.weights.stat().st_size

    def write(self, folder: Path) -> None:
        """Copies both files."""
        shutil.copyfile(self.weights, folder / WEIGHTS_NAME)
        if self.config is None:
            _write_config(folder, self.sizes)
        else:
            shutil.copyfile(self.config, folder / CONFIG_NAME)


@dataclass(frozen=True)
class PickledAutoencoder:
    """Tensors in a file of torch.save.

    Attributes:
        tensors: the tensors, by the names of an autoencoder.
        sizes: the keyword arguments of `Autoencoder`, as the shapes say.
    """

    tensors: PickledTensors
    sizes: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.num_bytes for spec in self.tensors.found.values())

    def write(self, folder: Path) -> None:
        """Writes the tensors, in their dtypes and some rows at a time, and reads them back.

        Raises:
            CheckpointError: a value is infinite or no number, or the file reads back with other values.
        """
        path = folder / WEIGHTS_NAME
        with TensorFileWriter(path, self.tensors.found) as writer:
            for name, spec in self.tensors.found.items():
                num_rows = spec.shape[0]
                for start, stop in row_chunks(num_rows, spec.num_bytes // num_rows):
                    writer.write(name, self.tensors.read_rows(name, start, stop))
        if file_digests(path) != writer.digests:
            raise misread(path.name)
        _write_config(folder, self.sizes)


def open_autoencoder(path: Path) -> AutoencoderSource:
    """Checks an autoencoder's weights: a safetensors file, or a published pickle, whose sizes its shapes say.

    Raises:
        BitDanceError: there is no such file, or it is damaged or of another network.
    """
    if path.suffix in PICKLED_SUFFIXES and path.is_file():
        return _of_state(PickledFile(path))
    config = config_beside(path)
    return _of_files(path, config, read_json(config), copied=config)


def open_component(folder: Path, layout: PublishedLayout) -> AutoencoderSource:
    """Checks the autoencoder of a published folder.

    Raises:
        BitDanceError: a file is missing, or is damaged or of another network.
    """
    weights = folder / layout.autoencoder
    if layout is RELEASE:
        return open_autoencoder(weights)
    # Its configuration also names a class of diffusers' pipeline.
    config = folder / layout.autoencoder_config
    return _of_files(weights, config, read_part(config, layout), copied=None)


def _of_files(weights: Path, config: Path, content: Mapping[str, Any], copied: Path | None) -> AutoencoderFiles:
    sizes = published_sizes(content, str(config))
    with torch.device("meta"):
        check_weights(weights, Autoencoder(**sizes).state_dict())
    return AutoencoderFiles(weights, sizes, copied)


def _write_config(folder: Path, sizes: Mapping[str, Any]) -> None:
    write_text(folder / CONFIG_NAME, json.dumps(published_config(**sizes), indent=2) + "\n")


def import_autoencoder(file: PickledFile, out: Path, *, is_forced: bool = False) -> None:
    """Makes a folder of a published autoencoder's pickle: safetensors, configuration and report.

    Args:
        file: the pickle.
        out: the folder to make.
        is_forced: whether an earlier conversion there is replaced.

    Raises:
        CheckpointError: it is of another network, or the folder cannot be written.
    """
    source = _of_state(file)
    check_destination(out, is_forced=is_forced, num_bytes=source.num_bytes)
    with conversion_folder(out) as folder:
        source.write(folder)
        report = {
            "source": str(file.path),
            "kind": "autoencoder",
            "autoencoder_sha256": file_digest(folder / WEIGHTS_NAME),
            "version": bitdance_scale.__version__,
        }
        write_conversion_report(folder, report)


def pickled_autoencoder(tensors: PickledTensors) -> PickledAutoencoder:
    """Checks the tensors of an autoencoder in a pickle.

    Raises:
        CheckpointError: they are not those of one autoencoder.
    """
    sizes = deduced_sizes({name: spec.shape for name, spec in tensors.found.items()}, str(tensors.where))
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in Autoencoder(**sizes).state_dict().items()}
    check_tensors(tensors.where, tensors.found, wanted, "Save it again with the tensors of one autoencoder alone")
    return PickledAutoencoder(tensors, sizes)


def _of_state(file: PickledFile) -> PickledAutoencoder:
    if [*file.entries] != [STATE_ENTRY]:
        raise CheckpointError(
            f"{file.path}: holds {first_few([*file.entries, *file.ignored]) or 'nothing'}, expected `{STATE_ENTRY}`, "
            "the weights of an autoencoder; name the file of the autoencoder"
        )
    return pickled_autoencoder(PickledTensors(file, STATE_ENTRY))
