"""The adapters of a run's checkpoint, as those of an adapter folder: matrices by the names of published linears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bitdance_scale.checkpoint.frozen_base import FrozenBase, base_network, facts_of, find_frozen_base
from bitdance_scale.checkpoint.run_checkpoint import (
    CONFIG_NAME,
    TENSORS_DIR,
    TrainState,
    earlier_context,
    read_state,
)
from bitdance_scale.checkpoint.start_weights import chosen_weights, find_checkpoint, start_prefix
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import load_lora, load_network
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.adaptable import QUERY_DELTAS, AdaptableLinear, targets
from bitdance_scale.model.adapter_source import AdapterSource, Matrices, check_finite
from bitdance_scale.model.low_rank import ADAPTER, matrix_names
from bitdance_scale.model.published_names import Part, our_tensors
from bitdance_scale.sequence.condition import Condition, load_condition

QUERIES = f"{QUERY_DELTAS}weight"
_WEIGHT = ".weight"


@dataclass(frozen=True)
class RunAdapters:
    """The adapters of a checkpoint.

    Attributes:
        path: the checkpoint.
        state: how far its run is.
        section: rank, scale and targets.
        network: of its run.
        condition: its text tokenizer, or its classes.
        base: the frozen weights.
        weights: trained or averaged.
        stored: the tensors of the checkpoint.
        source: the adapters.
    """

    path: Path
    state: TrainState
    section: LoraSection
    network: NetworkConfig
    condition: Condition
    base: FrozenBase
    weights: str
    stored: StoredTensors
    source: AdapterSource

    @property
    def num_new_queries(self) -> int:
        """Query tokens of the run that the frozen weights lack."""
        found, _ = base_network(self.base, self.network)
        return self.network.vision.block_tokens - found.vision.block_tokens

    def tensor_files(self) -> set[str]:
        """The stored tensors that are read."""
        return {
            name
            for name in self.stored.index.tensors
            if name.startswith(start_prefix(self.path, self.stored.index, self.weights))
        }


def matrices_of(linear: AdaptableLinear) -> tuple[str, str]:
    """The global names of A and B of a linear."""
    a, b = matrix_names(linear.key)
    prefix = linear.ours.removesuffix(_WEIGHT) + ADAPTER
    return prefix + a, prefix + b


def has_adapters(path: Path) -> bool:
    """Whether a checkpoint is of a run with adapters."""
    return load_lora(path / CONFIG_NAME).is_used


def open_run_adapters(
    where: Path,
    *,
    weights: str | None = None,
    base: Path | None = None,
    tokenizer: Path | None = None,
    autoencoder: Path | None = None,
) -> RunAdapters:
    """Checks the adapters of a checkpoint; the only tensors that are read are a few rows of the frozen weights.

    Args:
        where: a checkpoint, or a run folder.
        weights: trained or averaged; None: averaged if there are some.
        base: where the frozen weights are; None: where the run had them.
        tokenizer: folder of its text tokenizer; None: as in its configuration.
        autoencoder: weights file of its autoencoder; None: as in its configuration.

    Raises:
        BitDanceError: it has no adapters or not these weights, is damaged, or its frozen weights are not there.
    """
    path = find_checkpoint(where)
    section = load_lora(path / CONFIG_NAME)
    if not section.is_used:
        raise ConfigError(f"{path}: is of a run without adapters (lora.rank = 0); name one that has some")
    state = read_state(path)
    overrides = [f"vision.context={context}"] if (context := earlier_context(path)) else []
    overrides += [f'text.path="{tokenizer}"'] if tokenizer else []
    overrides += [f'vision.weights="{autoencoder}"'] if autoencoder else []
    network = load_network(path / CONFIG_NAME, overrides)
    condition = load_condition(network)
    stored = StoredTensors(path / TENSORS_DIR)
    chosen = chosen_weights(path, stored.index, weights)
    frozen = find_frozen_base(path, state, base)
    facts = facts_of(frozen, *base_network(frozen, network))
    prefix = start_prefix(path, stored.index, chosen)
    linears = {linear.name: linear for linear in targets(network, condition.vocab_size, section.targets)}

    def read(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = stored.index.spec(prefix + name).shape[0] if stop is None else stop
        return check_finite(stored.read_rows(prefix + name, start, rows), f"{path}: {name}")

    # Published names, which a folder of adapters has.
    projector = {
        tensor.rows[0].published: tensor
        for tensor in our_tensors(network, condition.vocab_size)
        if tensor.part is Part.PROJECTOR and prefix + tensor.name in stored
    }
    source = AdapterSource(
        where=str(path),
        matrices={
            name: Matrices(section.rank, linear.out_size, linear.in_size, section.scale)
            for name, linear in linears.items()
        },
        projector={name: tensor.shape for name, tensor in projector.items()},
        num_queries=stored.index.spec(prefix + QUERIES).shape[0] if prefix + QUERIES in stored else 0,
        base=facts,
        read_a=lambda name: read(matrices_of(linears[name])[0]),
        read_b=lambda name, start, stop: read(matrices_of(linears[name])[1], start, stop),
        read_projector=lambda name: read(projector[name].name),
        read_queries=lambda: read(QUERIES),
    )
    return RunAdapters(path, state, section, network, condition, frozen, chosen, stored, source)
