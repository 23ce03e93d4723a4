"""A run with adapters that goes on from a folder of adapters, ours or PEFT's, under any layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bitdance_scale.checkpoint.frozen_base import FrozenBase, base_network, facts_of
from bitdance_scale.checkpoint.run_adapters import QUERIES, matrices_of
from bitdance_scale.config.coerce import toml_value
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.model.adaptable import PROJECTOR, targets
from bitdance_scale.model.adapter_folder import open_adapter_folder
from bitdance_scale.model.adapter_source import AdapterSource, Matrices, check_base, check_fits
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.wording import first_few

_MERGE = "or merge them into their base (bitdance export --merge), import that, and begin with new ones on it"


def fill_from_folder(
    folder: Path, values: Sequence[Mapping[str, ShardedValue]], base: FrozenBase, config: RunConfig, vocab_size: int
) -> None:
    """Fills what is trained from a folder of adapters; a collective.

    What the folder has not, a projector or changes of query tokens, begins as in a run without `lora.start_from`.

    Args:
        folder: the folder, on a file system that all ranks share.
        values: what this rank holds of what is trained, by global name: weights, and their masters.
        base: the frozen weights of the run.
        config: the run.
        vocab_size: rows of its embedding.

    Raises:
        ConfigError: on every rank: it has another rank, scale or other targets than the run.
        CheckpointError: on every rank: it is damaged, or of another network or other frozen weights.
    """
    on_first_rank(lambda: _check(open_adapter_folder(folder), base, config, vocab_size))
    with all_ranks(None, other=CheckpointError):
        readers = _readers(open_adapter_folder(folder), config, vocab_size)
        for held in values:
            for name, value in held.items():
                if name in readers:
                    _fill(value, readers[name]())


def _readers(source: AdapterSource, config: RunConfig, vocab_size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Global name -> reads the whole tensor."""
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for linear in targets(config.network, vocab_size, config.lora.targets):
        name_a, name_b = matrices_of(linear)
        readers[name_a] = functools.partial(source.read_a, linear.name)
        readers[name_b] = functools.partial(source.read_b, linear.name, 0, linear.out_size)
    for name in source.projector:
        readers[PROJECTOR + name] = functools.partial(source.read_projector, name)
    if source.num_queries:
        readers[QUERIES] = source.read_queries
    return readers


def _fill(value: ShardedValue, whole: torch.Tensor) -> None:
    """Gives the pieces of a value their part of the whole tensor."""
    for piece in value.pieces:
        where = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.tensor.shape, strict=True))
        piece.tensor.copy_(whole[where])


def _check(source: AdapterSource, base: FrozenBase, config: RunConfig, vocab_size: int) -> None:
    check_fits(source, config.network, vocab_size, "this run")
    _check_matrices(source, config)
    wanted = {linear.name for linear in targets(config.network, vocab_size, config.lora.targets)}
    if odd := sorted(wanted ^ {*source.matrices}):
        lacks = [name for name in odd if name in wanted]
        what = (
            f"{source.where} has no adapters of {first_few(lacks)}"
            if lacks
            else (f"{source.where} also has adapters of {first_few(odd)}")
        )
        raise ConfigError(
            f"lora.targets = {toml_value(config.lora.targets)}: {what}; a run goes on with the same ones. Set "
            f"lora.targets={toml_value(_kinds(source.matrices))}, {_MERGE}"
        )
    for setting, has in (("train_projector", source.projector), ("train_queries", source.num_queries)):
        if has and not getattr(config.lora, setting):
            raise ConfigError(
                f"lora.{setting} = false: {source.where} has what it trains; set lora.{setting}=true, {_MERGE}"
            )
    check_base(source, facts_of(base, *base_network(base, config.network)).fingerprint, str(base.path))


def _check_matrices(source: AdapterSource, config: RunConfig) -> None:
    """Rank and scale."""
    lora = config.lora
    for name, found in source.matrices.items():
        if found.rank != lora.rank:
            raise ConfigError(
                f"lora.rank = {lora.rank}: the adapters of {source.where} have {found.rank} ({name}), and matrices of "
                f"another rank cannot go on from these. Set lora.rank={found.rank}, {_MERGE}"
            )
        if not math.isclose(found.scale, lora.scale):
            factor = lora.rank**0.5 if lora.rank_stabilized else lora.rank
            raise ConfigError(
                f"lora.alpha = {lora.alpha}: the adapters of {source.where} are multiplied by {found.scale:g} "
                f"({name}), here by {lora.scale:g}. Set lora.alpha={found.scale * factor:g}, {_MERGE}"
            )


def _kinds(matrices: Mapping[str, Matrices]) -> tuple[str, ...]:
    """The last parts of names."""
    return tuple(sorted({name.rpartition(".")[2] for name in matrices}))
