"""Checkpoints of runs with adapters, written without training: random matrices beside an import."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.frozen_base import digest_of
from bitdance_scale.checkpoint.run_adapters import QUERIES, matrices_of
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, read_state, save_checkpoint
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR
from bitdance_scale.config.data_schema import DataFilter
from bitdance_scale.config.load import dump_toml, load_network
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import PROJECTOR, targets
from bitdance_scale.model.published_names import our_tensors
from bitdance_scale.parallel.partition import Piece, ShardedValue
from bitdance_scale.sequence.condition import load_condition
from tests.distributed.toy import toy_config

LORA = LoraSection(
    rank=3, alpha=6.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "head.*"), rank_stabilized=True
)


def adapted_config(imported: Path, lora: LoraSection, **run: object) -> RunConfig:
    """A run with adapters that starts from an import."""
    network = load_network(find_checkpoint(imported) / CONFIG_NAME)
    config = dataclasses.replace(toy_config(), **vars(network), lora=lora)
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, start_from=str(imported), dtype="bfloat16", **run)
    )


def write_adapted_run(
    imported: Path,
    out: Path,
    lora: LoraSection = LORA,
    *,
    seed: int = 0,
    is_averaged: bool = False,
    block_side: int | None = None,
    filters: tuple[DataFilter, ...] = (),
) -> Path:
    """A run folder whose checkpoint at step 3 has random adapters; returns it.

    The masters are in float32, the weights their bfloat16, the averages others. With `block_side` the run has distilled
    the import to larger blocks. `filters` are those of its data.
    """
    config = adapted_config(imported, lora, **({"stage": "distill", "new_queries": "mean"} if block_side else {}))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, filters=filters))
    if block_side:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, block_side=block_side))
    base = find_checkpoint(imported)
    condition = load_condition(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in targets(config.network, condition.vocab_size, lora.targets):
        name_a, name_b = matrices_of(linear)
        shapes |= {name_a: (lora.rank, linear.in_size), name_b: (linear.out_size, lora.rank)}
    if lora.train_projector:
        tensors = our_tensors(config.network, condition.vocab_size)
        shapes |= {tensor.name: tensor.shape for tensor in tensors if tensor.name.startswith(PROJECTOR)}
    if lora.train_queries:
        shapes[QUERIES] = (config.vision.block_tokens - 1, config.model.hidden_size)
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}

    masters = drawn()
    optimizer = {f"master.{name}": _whole(value) for name, value in masters.items()}
    if is_averaged:
        optimizer |= {f"average.{name}": _whole(value) for name, value in drawn().items()}
    model = {name: _whole(value.to(torch.bfloat16)) for name, value in masters.items()}
    state = dataclasses.replace(
        read_state(base), step=3, base_digest=digest_of(base), tokenizer_digest=condition.digest
    )
    save_checkpoint(CheckpointFolder(out / CHECKPOINTS_DIR, keep=1), state, model, optimizer, dump_toml(config))
    return out


def _whole(value: torch.Tensor) -> ShardedValue:
    return ShardedValue(tuple(value.shape), value.dtype, (Piece((0,) * value.dim(), value),))
