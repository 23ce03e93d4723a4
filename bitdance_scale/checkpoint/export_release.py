"""A checkpoint as a published folder, which the release's pipeline and `generate/` load.

    config.json, model*.safetensors (+ index), tokenizer files    a plain Qwen3ForCausalLM
    vision_head_config.json, vision_head.safetensors, projector.safetensors
    ae_config.json, ae.safetensors                                copied from where the run has them
    conversion_report.json                                        written last

Every tensor is written row block by row block, so that none is ever whole in memory. What is written in float32 comes
from the checkpoint's float32 masters where it has them; what is written in the dtype of training comes from the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.conversion_folder import Progress, check_outcome, conversion_folder, write_report
from bitdance_scale.checkpoint.digest import file_digest, text_digest
from bitdance_scale.checkpoint.published_names import Part, PublishedTensor, published_tensors
from bitdance_scale.checkpoint.published_tensors import PART_FILES, PublishedTensors, row_chunks
from bitdance_scale.checkpoint.run_checkpoint import (
    CONFIG_NAME,
    MASTER_PREFIX,
    MODEL_PREFIX,
    TENSORS_DIR,
    TrainState,
    read_state,
)
from bitdance_scale.checkpoint.start_weights import check_network, find_checkpoint
from bitdance_scale.checkpoint.stored_tensors import StoredTensors
from bitdance_scale.checkpoint.tensor_file import TensorFileWriter
from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_config import (
    HEAD_CONFIG_NAME,
    MODEL_CONFIG_NAME,
    beyond_release,
    published_head,
    published_model,
)
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.tokenizer_files import write_tokenizer
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.vision.autoencoder import published_config
from bitdance_scale.vision.tokenizer import autoencoder_sizes, make_autoencoder
from bitdance_scale.vision.weights import CONFIG_NAME as AE_CONFIG_NAME
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.vision.weights import check_weights
from bitdance_scale.weight_files import TensorSpec

MAX_FILE_BYTES = 5 * 10**9
# What weights that started at random are published in; a release's own dtypes are kept.
DEFAULT_DTYPES: Mapping[Part, str] = {Part.BACKBONE: "bfloat16", Part.HEAD: "float32", Part.PROJECTOR: "float32"}


@dataclass(frozen=True)
class Export:
    """A checkpoint to publish, looked through: everything in it fits together.

    Attributes:
        path: the checkpoint.
        state: how far its run is.
        config_sha256: digest of its resolved configuration.
        network: its network.
        tokenizer: its text tokenizer.
        stored: its tensors.
        tensors: the published tensors, with the dtype of each.
    """

    path: Path
    state: TrainState
    config_sha256: str
    network: NetworkConfig
    tokenizer: TextTokenizer
    stored: StoredTensors
    tensors: tuple[tuple[PublishedTensor, TensorSpec], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all published tensors, the autoencoder's left out."""
        return sum(spec.num_bytes for _, spec in self.tensors)

    def source(self, ours: str, dtype: torch.dtype) -> str:
        """The stored tensor that gives one of ours in a dtype."""
        weights, masters = MODEL_PREFIX + ours, MASTER_PREFIX + ours
        has_masters = masters in self.stored and self.stored.dtype(weights) != dtype
        return masters if has_masters else weights


def open_checkpoint(
    where: Path,
    *,
    tokenizer: Path | None = None,
    autoencoder: Path | None = None,
    dtypes: Mapping[Part, str] | None = None,
) -> Export:
    """Looks through a checkpoint without reading a tensor.

    Args:
        where: a checkpoint, a run folder or a converted release.
        tokenizer: where its text tokenizer is now; None: where its configuration says.
        autoencoder: where its autoencoder's weights are now, likewise.
        dtypes: dtypes of parts that are not to be those of the release it started from.

    Raises:
        BitDanceError: it is damaged, or its configuration, tokenizer or autoencoder does not fit it.
    """
    path = find_checkpoint(where)
    state = read_state(path)
    config_path = path / CONFIG_NAME
    overrides = [f"text.path={json.dumps(str(tokenizer))}"] if tokenizer else []
    overrides += [f"vision.weights={json.dumps(str(autoencoder))}"] if autoencoder else []
    network = load_network(config_path, overrides)
    if network.model.mask != "block":
        raise ConfigError(
            f"{config_path}: model.mask = {network.model.mask!r}: the release's code lets all positions of a block see "
            "each other and would compute something else; only models of mask 'block' can be exported"
        )
    text = load_text_tokenizer(network.text, network.vision.block_tokens)
    if text.digest != state.tokenizer_digest:
        raise CheckpointError(
            f"{path}: trained with another text tokenizer than is in {network.text.path}; name its own with --tokenizer"
        )
    if text.num_query_entries != network.vision.block_tokens - 1:
        raise CheckpointError(
            f"{network.text.path}: {text.num_query_entries} query tokens; blocks of {network.vision.block_tokens} tokens "
            f"need {network.vision.block_tokens - 1}, and the release's folders hold no more"
        )
    with torch.device("meta"):
        check_weights(network.vision.weights_path, make_autoencoder(network.vision).state_dict())
    stored = StoredTensors(path / TENSORS_DIR)
    check_network(path, stored.index, network, text.vocab_size)
    chosen = (
        DEFAULT_DTYPES | {Part(part): name for part, name in state.release.get("dtypes", {}).items()} | (dtypes or {})
    )
    tensors = tuple(
        (tensor, TensorSpec(tensor.shape, getattr(torch, chosen[tensor.part])))
        for tensor in published_tensors(network, text.vocab_size)
    )
    digest = text_digest(config_path.read_text(encoding="utf-8"))
    return Export(path, state, digest, network, text, stored, tensors)


def export_release(export: Export, out: Path, *, is_forced: bool = False, progress: Progress = lambda _: None) -> None:
    """Writes the published folder, and reads it back to see that its files hold what was written.

    Args:
        export: from `open_checkpoint`.
        out: the folder to make.
        is_forced: whether an earlier conversion there is replaced.
        progress: called with bytes done: `2 * export.num_bytes` in all.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written; nothing is left then, and an
            earlier `out` is as it was.
    """
    network = export.network
    autoencoder = network.vision.weights_path
    check_outcome(out, is_forced=is_forced, num_bytes=export.num_bytes + autoencoder.stat().st_size)
    for file in export.stored.files(_sources(export)):
        export.stored.check(file)
    with conversion_folder(out) as folder:
        write_tokenizer(network.text, export.tokenizer, folder)
        shutil.copyfile(autoencoder, folder / AE_WEIGHTS_NAME)
        _write_json(folder / AE_CONFIG_NAME, published_config(**autoencoder_sizes(network.vision)))
        _write_json(folder / MODEL_CONFIG_NAME, _model_config(export))
        inert = export.state.release.get("head", {})
        _write_json(
            folder / HEAD_CONFIG_NAME, published_head(network.head, network.model.hidden_size, network.vision, inert)
        )
        digests = {part: _write_part(export, part, folder, progress) for part in Part}
        for part in Part:
            _read_back(folder, part, digests[part], progress)
        extra = beyond_release(network.head)
        write_report(
            folder,
            {
                "source": str(export.path),
                "step": export.state.step,
                "config_sha256": export.config_sha256,
                "autoencoder_sha256": file_digest(folder / AE_WEIGHTS_NAME),
                "version": bitdance_scale.__version__,
                "reloaded": "every tensor, by the SHA-256 of what was written",
                "runs_in_published_pipeline": not extra,
                "unknown_to_published_pipeline": extra,
                "tensor_sha256": {part.value: digests[part] for part in Part},
            },
        )


def _model_config(export: Export) -> dict[str, Any]:
    dtype = next(spec.dtype for tensor, spec in export.tensors if tensor.part is Part.BACKBONE)
    inert = {"eos_token_id": int(export.tokenizer.turn_end_ids[0])} | export.state.release.get("model", {})
    model, vocab_size = export.network.model, export.tokenizer.vocab_size
    return published_model(model, vocab_size, str(dtype).removeprefix("torch."), inert)


def _sources(export: Export) -> set[str]:
    return {export.source(ours, spec.dtype) for tensor, spec in export.tensors for ours, _ in tensor.rows}


def _write_part(export: Export, part: Part, folder: Path, progress: Progress) -> dict[str, str]:
    """Writes the files of a part; SHA-256 of each tensor by name."""
    tensors = {tensor.name: (tensor, spec) for tensor, spec in export.tensors if tensor.part is part}
    files = _files({name: spec for name, (_, spec) in tensors.items()}, part)
    digests: dict[str, str] = {}
    for file, names in files.items():
        with TensorFileWriter(folder / file, {name: tensors[name][1] for name in names}) as writer:
            for name in names:
                for values in _chunks(export, *tensors[name]):
                    writer.write(name, values)
                    progress(values.nbytes)
        digests |= writer.digests
    if len(files) > 1:
        total = sum(spec.num_bytes for _, spec in tensors.values())
        weight_map = {name: file for file, names in files.items() for name in names}
        _write_json(
            folder / f"{PART_FILES[part]}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return digests


def _files(specs: Mapping[str, TensorSpec], part: Part) -> dict[str, list[str]]:
    """File name -> tensors, in order; only the backbone is ever in several files."""
    if part is not Part.BACKBONE:
        return {PART_FILES[part]: [*specs]}
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in specs.items():
        if groups[-1] and num_bytes + spec.num_bytes > MAX_FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += spec.num_bytes
    if len(groups) == 1:
        return {PART_FILES[part]: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _chunks(export: Export, tensor: PublishedTensor, spec: TensorSpec) -> Iterator[torch.Tensor]:
    """The values of a published tensor, some rows at a time."""
    # Read in the stored dtype, which is at most four bytes wide.
    row_bytes = max(1, torch.Size(tensor.shape[1:]).numel()) * 4
    for ours, shared in tensor.rows:
        stored = export.source(ours, spec.dtype)
        for start, stop in row_chunks(shared.num_rows, row_bytes):
            yield export.stored.read_rows(stored, shared.start + start, shared.start + stop).to(spec.dtype)


def _read_back(folder: Path, part: Part, digests: Mapping[str, str], progress: Progress) -> None:
    """Hashes what the safetensors library finds in the files just written."""
    written = PublishedTensors(folder, part)
    for name, wanted in digests.items():
        spec = written.found[name]
        digest = hashlib.sha256()
        for start, stop in row_chunks(spec.shape[0], spec.num_bytes // spec.shape[0]):
            values = written.read_rows(name, start, stop)
            digest.update(values.view(-1).view(torch.uint8).numpy())
            progress(values.nbytes)
        if digest.hexdigest() != wanted:
            raise CheckpointError(
                f"{written.file(name).name}: {name} reads back with other values than were written; the disk or the "
                "memory of this machine is at fault"
            )
    if {*written.found} != {*digests}:
        raise CheckpointError(f"{folder}: the files of the {part} do not hold the tensors that were written")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
