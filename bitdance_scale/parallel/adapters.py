"""Freezes the stages of a rank and gives them what is trained instead: adapters, and on request a few weights.

Frozen weights have no gradient, no float32 master and no moments. They belong to the run that `run.start_from` names;
checkpoints of the run have what is trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import linears_of, targets
from bitdance_scale.model.published_names import NamedTensor, our_tensors
from bitdance_scale.parallel.adapter import AdaptedLinear, AdaptedPart, Adapter, Split, attach, split_of
from bitdance_scale.parallel.backbone import RMSNorm
from bitdance_scale.parallel.parameter_names import name_parameters, owners
from bitdance_scale.parallel.partition import Placement
from bitdance_scale.parallel.pipeline_stages import RankStages
from bitdance_scale.parallel.topology import Topology


def add_adapters(stages: RankStages, config: RunConfig, vocab_size: int, topology: Topology) -> None:
    """Freezes all weights of a rank, then adds what `lora` says to train; the new weights have no values yet.

    Raises:
        ConfigError: a pattern of `lora.targets` matches no linear.
    """
    section = config.lora
    chosen = {linear.name for linear in targets(config.network, vocab_size, section.targets)}
    located, modules = name_parameters(stages, topology), owners(stages.stages)
    stages.requires_grad_(False)
    for module in stages.modules():
        if isinstance(module, RMSNorm):
            # There is no gradient to sum.
            module.sums_in_backward = False
    for tensor in our_tensors(config.network, vocab_size):
        parts = [linear for linear in linears_of(tensor) if linear.name in chosen]
        if parts and tensor.name in located:
            linear, placement = modules[tensor.name], located[tensor.name].placement
            keys = {part.published: part.key for part in parts}
            attach(linear, _make_adapter(linear, tensor, keys, placement, config, topology))
    for stage in stages.stages:
        if stage.is_first and section.train_projector:
            stage.projector.requires_grad_(True)
        if stage.is_first and section.train_queries:
            stage.add_query_deltas(config.vision.block_tokens - 1)


def _make_adapter(
    linear: nn.Module,
    tensor: NamedTensor,
    keys: Mapping[str, str],
    placement: Placement,
    config: RunConfig,
    topology: Topology,
) -> Adapter:
    """The adapter of one of our linears.

    Args:
        linear: the linear.
        tensor: its weight.
        keys: published tensors in it that are adapted -> their keys.
        placement: of the weight.
        config: the run.
        topology: the ranks.
    """
    split, rank = split_of(linear), config.lora.rank
    out_size, in_size = tensor.shape
    if split is Split.INPUT:
        a = Placement.split((rank, placement.local_shape[1]), 1, topology.tensor_rank, topology.tensor_size)
    else:
        a = Placement.replicated((rank, in_size))
    num_rows = {part.published: part.out_size for part in linears_of(tensor)}
    own = _own_rows(tensor, placement if split is Split.OUTPUT else Placement.replicated((out_size, in_size)))
    parts = [AdaptedPart(key, a, _rows_placement(own[name], num_rows[name], rank)) for name, key in keys.items()]
    name = tensor.name.removesuffix(".weight")
    facts = AdaptedLinear(
        name=name,
        split=split,
        is_sequence_parallel=bool(getattr(linear, "sequence_parallel", False)),
        first_channel=a.blocks[0][1] if a.dim == 1 else 0,
        order=_order(own, list(keys)),
    )
    # The embedding of the flow time has one row per draw, not per token.
    dropout = 0.0 if ".time_embed." in name else config.lora.dropout
    dtype = getattr(torch, config.run.dtype)
    return Adapter(facts, parts, config.lora.scale, dropout, dtype, topology.tensor_rank, topology.tensor_size)


def _own_rows(tensor: NamedTensor, placement: Placement) -> dict[str, list[tuple[int, int]]]:
    """Published tensor -> (row of this rank's weight, row in the published tensor) of all its rows on this rank."""
    blocks = placement.blocks if placement.dim == 0 else ((0, 0, tensor.shape[0]),)
    found: dict[str, list[tuple[int, int]]] = {}
    for shared in tensor.rows:
        rows = found.setdefault(shared.published, [])
        for local_start, global_start, length in blocks:
            start = max(shared.start, global_start)
            stop = min(shared.start + shared.num_rows, global_start + length)
            rows.extend(
                (row - global_start + local_start, row - shared.start + shared.published_start)
                for row in range(start, stop)
            )
    return found


def _rows_placement(rows: list[tuple[int, int]], num_rows: int, rank: int) -> Placement:
    """Where this rank's rows of a B matrix lie in the whole one; they are kept in the order of the whole one."""
    published = sorted(row for _, row in rows)
    if len(published) == num_rows:
        return Placement.replicated((num_rows, rank))
    starts = [index for index, row in enumerate(published) if not index or row != published[index - 1] + 1]
    blocks = tuple(
        (start, published[start], stop - start)
        for start, stop in zip(starts, [*starts[1:], len(published)], strict=True)
    )
    return Placement((num_rows, rank), (len(published), rank), 0, blocks)


def _order(own: Mapping[str, list[tuple[int, int]]], adapted: Sequence[str]) -> list[int] | None:
    """`AdaptedLinear.order`."""
    source: dict[int, int] = {}
    num_stacked = 0
    for name in adapted:
        for number, (local, _) in enumerate(sorted(own[name], key=lambda pair: pair[1])):
            source[local] = num_stacked + number
        num_stacked += len(own[name])
    num_local = sum(map(len, own.values()))
    order = [source.get(local, num_stacked) for local in range(num_local)]
    return None if len(adapted) == 1 and order == list(range(num_local)) else order
