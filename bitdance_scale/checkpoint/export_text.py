"""A text-to-image checkpoint as published files, in either layout (`generate/published_layout.py`).

Every tensor is written some rows at a time, so that none is ever whole in memory, and read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.conversion_folder import OnBytes, misread
from bitdance_scale.checkpoint.integrity import tensor_bytes
from bitdance_scale.checkpoint.published_files import PublishedTensors, TensorFileWriter, part_file, row_chunks
from bitdance_scale.checkpoint.run_checkpoint import read_section
from bitdance_scale.config.published_backbone import published_model
from bitdance_scale.config.published_head import published_head
from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.published_layout import INDEX_NAME, RELEASE, PublishedLayout, projector_config
from bitdance_scale.generate.sampling_file import write_sampling
from bitdance_scale.model.published_names import Part
from bitdance_scale.sequence.tokenizer_files import write_tokenizer
from bitdance_scale.sequence.tokens import TextTokenizer
from bitdance_scale.sharing.diffusers_files import component_config, copy_pipeline, pipeline_index
from bitdance_scale.vision.autoencoder import published_config
from bitdance_scale.vision.tokenizer import autoencoder_sizes
from bitdance_scale.weight_files import INDEX_SUFFIX, TensorSpec, dtype_name

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.export_release import Export

MAX_FILE_BYTES = 5 * 10**9


def write_text_files(export: Export, folder: Path, on_bytes: OnBytes) -> dict[str, dict[str, str]]:
    """Writes a model, but for the weights of its autoencoder, into a folder that is being made.

    Args:
        export: the checkpoint, of a text-to-image network.
        folder: where to; it has the folders of the layout.
        on_bytes: called as bytes are written and read back: `2 * export.num_bytes` in all.

    Returns:
        Part -> tensor -> hexadecimal SHA-256.

    Raises:
        CheckpointError: a file reads back with other values.
    """
    network, layout = export.network, export.layout
    assert isinstance(export.condition, TextTokenizer)
    write_tokenizer(network.text, export.condition, folder / layout.tokenizer)
    inert = export.state.release.get("head", {})
    hidden_size, num_bits = network.model.hidden_size, network.vision.num_bits
    configs = {
        layout.model_config: _model_config(export, export.condition),
        layout.head_config: published_head(network.head, hidden_size, network.vision, inert),
        layout.autoencoder_config: published_config(**autoencoder_sizes(network.vision)),
        layout.projector_config: projector_config(num_bits, hidden_size),
    }
    for file, content in configs.items():
        if file:
            _write_json(folder / file, component_config(file, content) if layout is not RELEASE else content)
    if export.run is not None:
        write_sampling(folder, read_section(export.path, "sample"))
    if layout is not RELEASE:
        _write_json(folder / INDEX_NAME, pipeline_index())
        copy_pipeline(folder)
    digests = {part.value: _write_part(export, part, folder, on_bytes) for part in Part}
    for part in Part:
        read_back(folder, part, layout, digests[part.value], on_bytes)
    return digests


def _model_config(export: Export, tokenizer: TextTokenizer) -> dict[str, Any]:
    dtype = export.dtypes[export.weights][Part.BACKBONE]
    inert = {"eos_token_id": int(tokenizer.turn_end_ids[0])} | export.state.release.get("model", {})
    model, vocab_size = export.network.model, tokenizer.vocab_size
    return published_model(model, vocab_size, dtype_name(dtype), inert, export.network.vision.context)


def _write_part(export: Export, part: Part, folder: Path, on_bytes: OnBytes) -> dict[str, str]:
    """Writes the files of a part; returns name -> SHA-256 of each tensor."""
    tensors = {tensor.name: (tensor, spec) for tensor, spec in export.tensors(export.weights) if tensor.part is part}
    whole = folder / part_file(part, export.layout)
    files = _files({name: spec for name, (_, spec) in tensors.items()}, part, whole.name)
    digests: dict[str, str] = {}
    for file, names in files.items():
        with TensorFileWriter(whole.with_name(file), {name: tensors[name][1] for name in names}) as writer:
            for name in names:
                for values in export.chunks(*tensors[name], export.weights):
                    writer.write(name, values)
                    on_bytes(values.nbytes)
        digests |= writer.digests
    if len(files) > 1:
        total = sum(spec.num_bytes for _, spec in tensors.values())
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(whole.with_name(whole.name + INDEX_SUFFIX), index)
    return digests


def _files(specs: Mapping[str, TensorSpec], part: Part, whole: str) -> dict[str, list[str]]:
    """File name -> its tensors, in order; only the backbone can be in several files, else all are in one, `whole`."""
    if part is not Part.BACKBONE:
        return {whole: [*specs]}
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in specs.items():
        if groups[-1] and num_bytes + spec.num_bytes > MAX_FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += spec.num_bytes
    if len(groups) == 1:
        return {whole: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def read_back(folder: Path, part: Part, layout: PublishedLayout, digests: Mapping[str, str], on_bytes: OnBytes) -> None:
    """Hashes what the safetensors library finds in the files just written."""
    written = PublishedTensors(folder, part, layout)
    for name, wanted in digests.items():
        spec = written.found[name]
        digest = hashlib.sha256()
        for start, stop in row_chunks(spec.shape[0], spec.num_bytes // spec.shape[0]):
            values = written.read_rows(name, start, stop)
            digest.update(tensor_bytes(values))
            on_bytes(values.nbytes)
        if digest.hexdigest() != wanted:
            raise misread(f"{written.file(name).name}: {name}")
    if {*written.found} != {*digests}:
        raise CheckpointError(f"{folder}: the files of the {part} hold other tensors than were written; convert again")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
