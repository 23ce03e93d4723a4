"""The frozen weights beside which the adapters of a checkpoint were trained: another checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdance_scale.checkpoint.conversion_folder import REPORT_NAME
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME, find_damage, read_manifest
from bitdance_scale.checkpoint.published_files import published_rows
from bitdance_scale.checkpoint.remote_folder import is_remote
from bitdance_scale.checkpoint.run_checkpoint import (
    CONFIG_NAME,
    TENSORS_DIR,
    TrainState,
    read_run_section,
)
from bitdance_scale.checkpoint.start_weights import find_checkpoint, start_files, start_prefix
from bitdance_scale.checkpoint.step_names import START_DIR, STEP_NAME
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import load_network
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.adapter_source import BaseFacts, fingerprint, sizes_of
from bitdance_scale.model.published_names import Part, published_tensors
from bitdance_scale.sequence.condition import load_condition


@dataclass(frozen=True)
class FrozenBase:
    """Frozen weights.

    Attributes:
        path: their checkpoint.
        weights: which of it they are: trained or averaged.
        name: what their run called them; the published folder that an import was made of.
    """

    path: Path
    weights: str
    name: str

    @property
    def is_import(self) -> bool:
        """Whether they are those of the published folder, which no run has trained."""
        return "steps" not in read_run_section(self.path)


def digest_of(checkpoint: Path) -> str:
    """Two checkpoints share it only if all their files are equal."""
    manifest = checkpoint / MANIFEST_NAME
    return read_manifest(manifest.read_bytes(), str(manifest)).sha256


def check_base_digest(path: Path, state: TrainState, base: Path, digest: str) -> None:
    """Compares the frozen weights that the adapters of a checkpoint were trained beside with others.

    Args:
        path: the checkpoint.
        state: how far it is.
        base: the checkpoint of the others.
        digest: its `digest_of`.

    Raises:
        CheckpointError: they are others.
    """
    if state.base_digest != digest:
        raise CheckpointError(
            f"{path}: its adapters were trained beside other weights (digest {state.base_digest or 'none'}) than those "
            f"of {base} (digest {digest}); set run.start_from and run.start_weights as in {path / CONFIG_NAME}"
        )


def fetched_base(path: Path, state: TrainState, weights: str) -> Path | None:
    """The frozen weights of a checkpoint with adapters in its run's folder, which fetched them from S3 once.

    Args:
        path: the checkpoint.
        state: how far it is.
        weights: which of the frozen weights are wanted: trained or averaged.

    Returns:
        The partial checkpoint; None where the folder has none that is whole and the very same.
    """
    for base in sorted((path.absolute().parents[1] / START_DIR).glob("*")):
        # Its small files first, which say what else it must have.
        is_whole = STEP_NAME.fullmatch(base.name) and find_damage(base, ()) is None
        if is_whole and digest_of(base) == state.base_digest:
            files = start_files(base, read_index(base / TENSORS_DIR), weights)
            if find_damage(base, files) is None:
                return base
    return None


def find_frozen_base(path: Path, state: TrainState, named: Path | None = None) -> FrozenBase:
    """The frozen weights of a checkpoint with adapters.

    Args:
        path: the checkpoint.
        state: how far it is.
        named: where they are; None: where its run had them.

    Raises:
        CheckpointError: they are not there, or are others.
    """
    run = read_run_section(path)
    where = run["start_from"]
    if named is None and is_remote(where):
        named = fetched_base(path, state, run.get("start_weights", "trained"))
        if named is None:
            raise CheckpointError(
                f"{path}: its frozen weights are on S3 ({where}), and {path.absolute().parents[1] / START_DIR} has no "
                "whole copy of them; name one on this machine with --base"
            )
    try:
        base = find_checkpoint(named or where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: the frozen weights beside its adapters are needed: {error}; if they were moved, name them with "
            "--base"
        ) from error
    check_base_digest(path, state, base, digest_of(base))
    return FrozenBase(base, run.get("start_weights", "trained"), _name_of(base, where))


def facts_of(base: FrozenBase, network: NetworkConfig, vocab_size: int) -> BaseFacts:
    """What tells frozen weights from others.

    Args:
        base: the weights.
        network: their network.
        vocab_size: rows of its embedding.
    """
    read = first_rows_of(base, network, vocab_size)
    return BaseFacts(base.name, sizes_of(network), fingerprint(network, vocab_size, read))


def first_rows_of(
    base: FrozenBase, network: NetworkConfig, vocab_size: int
) -> Callable[[Part, str, int], torch.Tensor]:
    """Reads the first rows of a published tensor, as `fingerprint` asks for them."""
    folder = base.path / TENSORS_DIR
    prefix = start_prefix(base.path, read_index(folder), base.weights)
    stored = StoredTensors(folder, prefix)
    tensors = {(tensor.part, tensor.name): tensor for tensor in published_tensors(network, vocab_size)}

    def read(ours: str, start: int, stop: int) -> torch.Tensor:
        return stored.read_rows(prefix + ours, start, stop)

    return lambda part, name, num_rows: published_rows(tensors[part, name], read, 0, num_rows)


def base_network(base: FrozenBase, network: NetworkConfig) -> tuple[NetworkConfig, int]:
    """The network of frozen weights and the rows of its embedding.

    Args:
        base: the weights.
        network: of the run beside them, which may have added query tokens; its paths are taken.
    """
    block_side = load_network(base.path / CONFIG_NAME).vision.block_side
    found = dataclasses.replace(network, vision=dataclasses.replace(network.vision, block_side=block_side))
    return found, load_condition(found, block_side**2).vocab_size


def _name_of(base: Path, where: str) -> str:
    """The published folder that an import was made of; of a run what `run.start_from` says."""
    for parent in base.parents[:2]:
        try:
            return str(json.loads((parent / REPORT_NAME).read_text(encoding="utf-8"))["source"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return where
