"""A checkpoint as a published folder, which the release's pipeline and `generate/` load.

    config.json, model*.safetensors (+ index), tokenizer files    a plain Qwen3ForCausalLM
    vision_head_config.json, vision_head.safetensors, projector.safetensors
    ae_config.json, ae.safetensors                                the run's autoencoder
    README.md, LICENSE, samples.png                               for those whom it is shared with
    conversion_report.json                                        written last

`export_text.py` writes them, in this layout or in that of a diffusers pipeline; `export_class.py` says what a
class-conditional network becomes.

Every tensor is written some rows at a time, so that none is ever whole in memory. Averaged weights come from the
checkpoint's averages, which are float32. Of the trained ones, tensors that are written in float32 come from its float32
masters, if it has them, and tensors that are written in the dtype of training come from the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bitdance_scale
from bitdance_scale.checkpoint.conversion_folder import (
    OnBytes,
    check_destination,
    conversion_folder,
    write_conversion_report,
)
from bitdance_scale.checkpoint.export_card import ShareOptions, export_facts
from bitdance_scale.checkpoint.export_class import write_class_files
from bitdance_scale.checkpoint.export_text import write_text_files
from bitdance_scale.checkpoint.integrity import file_digest, text_digest
from bitdance_scale.checkpoint.published_files import published_rows, row_chunks
from bitdance_scale.checkpoint.run_checkpoint import (
    AVERAGE_PREFIX,
    CONFIG_NAME,
    MASTER_PREFIX,
    MODEL_PREFIX,
    TENSORS_DIR,
    TrainState,
    check_vision,
    earlier_context,
    has_averages,
    read_run_section,
    read_state,
)
from bitdance_scale.checkpoint.start_weights import check_network, chosen_weights, find_checkpoint
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_class import beyond_class_release
from bitdance_scale.config.published_head import beyond_release
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_layout import RELEASE, PublishedLayout
from bitdance_scale.model.adapter_changes import AdapterChanges
from bitdance_scale.model.published_names import Part, PublishedTensor, published_tensors
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.sequence.tokens import TextTokenizer
from bitdance_scale.sharing.card import CardFacts, write_card
from bitdance_scale.vision.tokenizer import make_autoencoder, vision_digest
from bitdance_scale.vision.weights import check_weights
from bitdance_scale.weight_files import TensorSpec

DEFAULT_DTYPES: Mapping[Part, str] = {Part.BACKBONE: "bfloat16", Part.HEAD: "float32", Part.PROJECTOR: "float32"}
"""Dtypes of weights that started at random; weights that started from a release keep its dtypes."""
CLASS_DTYPES: Mapping[Part, str] = dict.fromkeys(Part, "float32")
"""The same of class-conditional networks, and of averaged weights."""


@dataclass(frozen=True)
class ExportedRun:
    """The run of an exported checkpoint.

    Attributes:
        name: its name.
        stage: its stage of training.
        step: optimiser steps taken at the checkpoint.
        num_steps: optimiser steps of the whole run.
    """

    name: str
    stage: str
    step: int
    num_steps: int

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint is the last of the run."""
        return self.step >= self.num_steps

    def __str__(self) -> str:
        return f"step {self.step} of {self.num_steps} of run {self.name}, stage {self.stage}"


@dataclass(frozen=True)
class Export:
    """A checkpoint to publish, checked: everything in it fits together.

    Attributes:
        path: the checkpoint.
        run: the run that made it; None for an import, which no run has trained.
        state: how far its run is.
        config_sha256: digest of its resolved configuration.
        network: its network.
        condition: its text tokenizer, or its classes.
        stored: its tensors.
        weights: which weights are published: trained or averaged.
        dtypes: kind of weights that the checkpoint has (trained, averaged) -> dtype of each part.
        layout: where the parts are put in the folder.
        changes: adapters that are merged; None: none.
        adapter_weights: which weights of its own adapters: trained or averaged; empty: it has none.
    """

    path: Path
    run: ExportedRun | None
    state: TrainState
    config_sha256: str
    network: NetworkConfig
    condition: Condition
    stored: StoredTensors
    weights: str
    dtypes: Mapping[str, Mapping[Part, torch.dtype]]
    layout: PublishedLayout = RELEASE
    changes: AdapterChanges | None = None
    adapter_weights: str = ""

    @property
    def stated_weights(self) -> str:
        """Which weights its run has trained are published: trained or averaged."""
        return self.adapter_weights or self.weights

    def tensors(self, weights: str) -> list[tuple[PublishedTensor, TensorSpec]]:
        """The published tensors of the trained or the averaged weights, with the dtype of each."""
        dtypes = self.dtypes[weights]
        return [
            (tensor, TensorSpec(tensor.shape, dtypes[tensor.part]))
            for tensor in published_tensors(self.network, self.condition.vocab_size)
        ]

    @property
    def published_weights(self) -> tuple[str, ...]:
        """The kinds of weights that are written: of a class-conditional network all that there are."""
        return (self.weights,) if self.network.model.parts.has_text else tuple(self.dtypes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all published tensors except the autoencoder's."""
        return sum(spec.num_bytes for weights in self.published_weights for _, spec in self.tensors(weights))

    @property
    def beyond_release(self) -> dict[str, Any]:
        """Sizes that the release's programs do not know; empty for a network that they can run."""
        is_text = self.network.model.parts.has_text
        return beyond_release(self.network.head) if is_text else beyond_class_release(self.network)

    @property
    def warning(self) -> str | None:
        """One line for the user if the run has not finished at this checkpoint; None otherwise."""
        if self.run is None or self.run.is_finished:
            return None
        return f"{self.path} is at {self.run}: the run has not finished"

    def source(self, ours: str, dtype: torch.dtype, kind: str) -> str:
        """Name of the stored tensor that one of ours is read from, if it is written in a dtype."""
        if kind == "averaged":
            return AVERAGE_PREFIX + ours
        weights, masters = MODEL_PREFIX + ours, MASTER_PREFIX + ours
        has_masters = masters in self.stored and self.stored.dtype(weights) != dtype
        return masters if has_masters else weights

    def chunks(self, tensor: PublishedTensor, spec: TensorSpec, kind: str) -> Iterator[torch.Tensor]:
        """The values of a published tensor, some rows at a time; one empty chunk of an empty tensor."""
        if self.changes is not None and self.changes.touches(tensor.part, tensor.name):

            def read(ours: str, start: int, stop: int) -> torch.Tensor:
                return self.stored.read_rows(self.source(ours, spec.dtype, kind), start, stop).to(spec.dtype)

            rows = functools.partial(published_rows, tensor, read)
            yield from self.changes.blocks(tensor.part, tensor.name, rows)
            return
        if not tensor.rows:
            yield torch.empty(0, dtype=spec.dtype)
        # Read in the stored dtype, which is at most four bytes wide.
        for ours, shared in tensor.rows:
            stored = self.source(ours, spec.dtype, kind)
            for start, stop in row_chunks(shared.num_rows, tensor.row_size * 4):
                yield self.stored.read_rows(stored, shared.start + start, shared.start + stop).to(spec.dtype)


def open_checkpoint(
    where: Path,
    *,
    tokenizer: Path | None = None,
    autoencoder: Path | None = None,
    dtypes: Mapping[Part, str] | None = None,
    weights: str | None = None,
    layout: PublishedLayout = RELEASE,
) -> Export:
    """Checks a checkpoint without reading a tensor.

    Args:
        where: a checkpoint, a run folder or an imported release.
        tokenizer: folder of its text tokenizer; None: as in its configuration.
        autoencoder: weights file of its autoencoder; None: as in its configuration.
        dtypes: dtypes of parts, in place of those of the release that it started from.
        weights: trained or averaged; None: the averaged weights if it has some, as the paper publishes them.
        layout: of the folder to make; a class-conditional network has one of its own.

    Raises:
        BitDanceError: it is damaged, or its configuration, tokenizer or autoencoder does not fit it; or it has no
            averaged weights where they are asked for.
    """
    path = find_checkpoint(where)
    state = read_state(path)
    config_path = path / CONFIG_NAME
    overrides = [f"text.path={json.dumps(str(tokenizer))}"] if tokenizer else []
    overrides += [f"vision.weights={json.dumps(str(autoencoder))}"] if autoencoder else []
    overrides += [f"vision.context={context}"] if (context := earlier_context(path)) else []
    network = load_network(config_path, overrides)
    if layout is not RELEASE and not network.model.parts.has_text:
        raise ConfigError(
            f"--layout {layout.name}: {path} is of a class-conditional network, and the pipeline in that layout draws "
            "from text; leave --layout out"
        )
    condition = checked_condition(path, network, state)
    with torch.device("meta"):
        check_weights(network.vision.weights_path, make_autoencoder(network.vision).state_dict())
    check_vision(path, state, vision_digest(network.vision))
    stored = StoredTensors(path / TENSORS_DIR)
    check_network(path, stored.index, network, condition.vocab_size)
    published = chosen_weights(path, stored.index, weights)
    chosen = {
        kind: {part: getattr(torch, name) for part, name in names.items()}
        for kind, names in _dtypes_of(network, state, dtypes or {}).items()
        if kind == "trained" or has_averages(stored.index)
    }
    digest = text_digest(config_path.read_text(encoding="utf-8"))
    run = run_of(path, state)
    return Export(path, run, state, digest, network, condition, stored, published, chosen, layout)


def _dtypes_of(network: NetworkConfig, state: TrainState, chosen: Mapping[Part, str]) -> dict[str, dict[Part, str]]:
    """Names of the dtypes of trained and of averaged weights: chosen, of the release, or usual, in this order."""

    def of_release(key: str) -> dict[Part, str]:
        return {Part(part): name for part, name in state.release.get(key, {}).items()}

    usual = DEFAULT_DTYPES if network.model.parts.has_text else CLASS_DTYPES
    trained = {**usual, **of_release("dtypes"), **chosen}
    # A text-to-image folder has one set of weights, in the same dtypes whichever they are.
    averaged = trained if network.model.parts.has_text else {**usual, **of_release("average_dtypes"), **chosen}
    return {"trained": trained, "averaged": averaged}


def run_of(path: Path, state: TrainState) -> ExportedRun | None:
    """The run of a checkpoint, and how far it is; None for an import."""
    section = read_run_section(path)
    if "steps" not in section:
        return None
    # Configurations of the first version have no stage: all runs were pretraining.
    return ExportedRun(section["name"], section.get("stage", "pt"), state.step, section["steps"])


def checked_condition(path: Path, network: NetworkConfig, state: TrainState) -> Condition:
    """The text tokenizer or the classes of a checkpoint; raises where the release's code could not run the model."""
    ablations = [
        ("model.mask", network.model.mask, "block", "lets all positions of a block see each other"),
        ("vision.order", network.vision.order, "block", "draws block by block"),
        ("head.kind", network.head.kind, "diffusion", "has a diffusion head"),
        ("vision.latents", network.vision.latents, "bits", "draws bits"),
    ]
    for setting, value, published, what in ablations:
        if value != published:
            raise ConfigError(
                f"{path / CONFIG_NAME}: {setting} = {value!r}: the release's code {what} and would compute something "
                f"else; only models of {setting} = {published!r} can be exported"
            )
    text = load_condition(network)
    if not isinstance(text, TextTokenizer):
        return text
    if text.digest != state.tokenizer_digest:
        raise CheckpointError(
            f"{path}: trained with another text tokenizer than is in {network.text.path}; name its own with --tokenizer"
        )
    num_queries = network.vision.block_tokens - 1
    if text.num_query_entries != num_queries:
        raise CheckpointError(
            f"{network.text.path}: {text.num_query_entries} query tokens; blocks of {network.vision.block_tokens} "
            f"tokens need {num_queries}, and the release's folders have exactly as many; name the tokenizer that the "
            "run was trained with"
        )
    return text


def export_release(
    export: Export,
    out: Path,
    *,
    options: ShareOptions | None = None,
    is_forced: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> CardFacts:
    """Writes what is published of a checkpoint, and reads it back to see that its files hold what was written.

    Args:
        export: from `open_checkpoint`.
        out: the folder to make.
        options: what the user says of it for those whom it is shared with.
        is_forced: whether an earlier conversion there is replaced.
        on_bytes: called as bytes are written and read back: `2 * export.num_bytes` in all.

    Returns:
        What its card says.

    Raises:
        ConfigError, DataError: the card cannot be written so (`export_facts`).
        CheckpointError: the checkpoint is damaged, or the folder cannot be written; nothing is left then, and an
            earlier `out` is as it was.
    """
    network = export.network
    autoencoder = network.vision.weights_path
    is_text = network.model.parts.has_text
    autoencoder_bytes = autoencoder.stat().st_size
    # A class-conditional network is written twice, with its autoencoder.
    num_bytes = export.num_bytes + autoencoder_bytes if is_text else 2 * export.num_bytes + 3 * autoencoder_bytes
    check_destination(out, is_forced=is_forced, num_bytes=num_bytes)
    facts = export_facts(export, options or ShareOptions())
    export.stored.check_files(
        {
            export.source(ours, spec.dtype, kind)
            for kind in export.published_weights
            for tensor, spec in export.tensors(kind)
            for ours, _ in tensor.rows
        }
    )
    with conversion_folder(out) as folder:
        for name in export.layout.folders:
            (folder / name).mkdir()
        copied = folder / export.layout.autoencoder
        shutil.copyfile(autoencoder, copied)
        digests = (write_text_files if is_text else write_class_files)(export, folder, on_bytes)
        write_card(folder, facts)
        write_conversion_report(folder, _report(export, digests, file_digest(copied)))
    return facts


def _report(export: Export, digests: Mapping[str, dict[str, str]], autoencoder_sha256: str) -> dict[str, Any]:
    extra, run = export.beyond_release, export.run
    return {
        "source": str(export.path),
        "step": export.state.step,
        "run": run and dataclasses.asdict(run) | {"is_finished": run.is_finished},
        "layout": export.layout.name,
        "weights": export.stated_weights,
        "adapters": [] if export.changes is None else export.changes.described(),
        "config_sha256": export.config_sha256,
        "autoencoder_sha256": autoencoder_sha256,
        "version": bitdance_scale.__version__,
        "reloaded": "every tensor, by the SHA-256 of what was written",
        "runs_in_published_pipeline": not extra,
        "unknown_to_published_pipeline": extra,
        "tensor_sha256": digests,
    }
