"""A class-conditional checkpoint as published files.

    model.safetensors     the chosen weights by their published names
    model.pt              torch.save of {"model": weights, "ema": averages}, each with the autoencoder as vae.*
    model_config.json     the sizes

The pickle holds plain tensors by name. It is written from mapped files, so that the tensors need not fit into memory.
What was read from a published file goes back as it was: which of the two dictionaries there were, the shape of
`query_token`, and whether the autoencoder was with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.class_source import ENTRIES, VAE_PREFIX
from bitdance_scale.checkpoint.conversion_folder import OnBytes, misread
from bitdance_scale.checkpoint.integrity import tensor_bytes
from bitdance_scale.checkpoint.pickled_files import AVERAGED_ENTRY, TRAINED_ENTRY, PickledFile
from bitdance_scale.checkpoint.published_files import TensorFileWriter, file_digests, row_chunks
from bitdance_scale.checkpoint.tensor_storage import opened
from bitdance_scale.config.published_class import PICKLE_NAME, SIZES_NAME, WEIGHTS_NAME, published_class_config
from bitdance_scale.model.published_names import PUBLISHED_QUERIES, Part, PublishedTensor
from bitdance_scale.vision.autoencoder import published_config
from bitdance_scale.vision.tokenizer import autoencoder_sizes
from bitdance_scale.vision.weights import CONFIG_NAME as AE_CONFIG_NAME
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.weight_files import TensorSpec

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.export_release import Export


def write_class_files(export: Export, folder: Path, on_bytes: OnBytes) -> dict[str, dict[str, str]]:
    """Writes the files into a folder that has the autoencoder's weights already, and reads them back.

    Args:
        export: the checkpoint.
        folder: a folder that is being made.
        on_bytes: called as bytes are written and read back: `2 * export.num_bytes` in all.

    Returns:
        Dictionary of the pickle -> tensor -> hexadecimal SHA-256.

    Raises:
        CheckpointError: a file reads back with other values.
    """
    content = json.dumps(published_class_config(export.network), indent=2)
    write_text(folder / SIZES_NAME, content + "\n")
    sizes = published_config(**autoencoder_sizes(export.network.vision))
    write_text(folder / AE_CONFIG_NAME, json.dumps(sizes, indent=2) + "\n")
    digests, files = {}, {}
    for entry, kind in _entries(export).items():
        files[entry] = folder / f"{entry}.safetensors.part"
        tensors = _with_queries(export, entry, kind)
        with TensorFileWriter(files[entry], {tensor.name: spec for tensor, spec in tensors}) as writer:
            for tensor, spec in tensors:
                for values in export.chunks(tensor, spec, kind):
                    writer.write(tensor.name, values)
                    on_bytes(values.nbytes)
        digests[entry] = writer.digests
    vae_digests = file_digests(folder / AE_WEIGHTS_NAME)
    with_vae = [entry for entry in files if _has_autoencoder(export, entry)]
    mapped = {
        entry: _mapped(file) | (_mapped(folder / AE_WEIGHTS_NAME, VAE_PREFIX) if entry in with_vae else {})
        for entry, file in files.items()
    }
    torch.save(mapped, folder / PICKLE_NAME)
    del mapped
    for entry in with_vae:
        digests[entry] |= {VAE_PREFIX + name: digest for name, digest in vae_digests.items()}
    _read_back_pickle(folder / PICKLE_NAME, digests, on_bytes)
    chosen = next(entry for entry, kind in _entries(export).items() if kind == export.weights)
    for entry, file in files.items():
        if entry == chosen:
            file.rename(folder / WEIGHTS_NAME)
        else:
            file.unlink()
    wanted = {name: digest for name, digest in digests[chosen].items() if not name.startswith(VAE_PREFIX)}
    if file_digests(folder / WEIGHTS_NAME) != wanted:
        raise misread(WEIGHTS_NAME)
    return digests


def _entries(export: Export) -> dict[str, str]:
    """Dictionary of the pickle -> which weights of the checkpoint are in it."""
    if export.run is None and export.state.release.get("entries") == [AVERAGED_ENTRY]:
        # An import of averaged weights, which no run has trained since: they are the only weights that it has.
        return {AVERAGED_ENTRY: "trained"}
    return {ENTRIES[kind]: kind for kind in export.published_weights}


def _has_autoencoder(export: Export, entry: str) -> bool:
    """Whether the autoencoder is in a dictionary: as in the file that was imported; in all, if none was."""
    release = export.state.release
    found = release.get("with_autoencoder")
    if found is None:
        return True
    return entry in found if entry in release["entries"] else bool(found)


def _with_queries(export: Export, entry: str, kind: str) -> list[tuple[PublishedTensor, TensorSpec]]:
    """The tensors of a dictionary, with `query_token` in the shape that the imported file had."""
    tensors = export.tensors(kind)
    shapes = export.state.release.get("query_shapes", {})
    shape = shapes.get(entry, shapes.get(TRAINED_ENTRY, shapes.get(AVERAGED_ENTRY)))
    if shape is None:
        return tensors
    if export.network.vision.block_tokens == 1:
        if math.prod(shape):
            return tensors
        empty = PublishedTensor(PUBLISHED_QUERIES, tuple(shape), Part.BACKBONE, (), ())
        return [*tensors, (empty, TensorSpec(empty.shape, export.dtypes[kind][Part.BACKBONE]))]

    def reshaped(tensor: PublishedTensor, spec: TensorSpec) -> tuple[PublishedTensor, TensorSpec]:
        if tensor.name != PUBLISHED_QUERIES or len(shape) == len(tensor.shape):
            return tensor, spec
        return dataclasses.replace(tensor, shape=tensor.shape[1:]), TensorSpec(tensor.shape[1:], spec.dtype)

    return [reshaped(*item) for item in tensors]


def _mapped(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each with its own storage in the mapped file."""
    with opened(path) as file:
        return {prefix + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


def _read_back_pickle(path: Path, digests: Mapping[str, Mapping[str, str]], on_bytes: OnBytes) -> None:
    """Hashes what weights-only loading finds in the pickle just written."""
    file = PickledFile(path)
    found = {
        entry: {name: _digest(file, entry, name, spec, on_bytes) for name, spec in specs.items()}
        for entry, specs in file.entries.items()
    }
    if found != digests:
        raise misread(path.name)


def _digest(file: PickledFile, entry: str, name: str, spec: TensorSpec, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    for values in _row_parts(file, entry, name, spec):
        digest.update(tensor_bytes(values))
        if not name.startswith(VAE_PREFIX):
            on_bytes(values.nbytes)
    return digest.hexdigest()


def _row_parts(file: PickledFile, entry: str, name: str, spec: TensorSpec) -> Iterator[torch.Tensor]:
    if not spec.num_bytes:
        return
    for start, stop in row_chunks(spec.shape[0], spec.num_bytes // spec.shape[0]):
        yield file.read_rows(entry, name, spec.shape[1:], start, stop)
