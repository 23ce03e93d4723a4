"""How many parameters a rank holds: tensor-parallel ranks divide matrices and tables, and repeat norms and biases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bitdance_scale.config.schema import (
    NUM_MODULATIONS,
    NUM_TIME_FEATURES,
    NUM_TOKEN_MODULATIONS,
    RunConfig,
)

FLOAT_BYTES = 4


@dataclass(frozen=True)
class RankStages:
    """What a pipeline rank holds.

    Attributes:
        rank: its place in the pipeline.
        num_layers: backbone layers of each of its stages, in the order in which a micro-batch passes through them.
        is_first: whether it holds embedding and projector.
        is_last: whether it holds the head and the projection to the vocabulary.
        layers: numbers of its layers, counted over the whole backbone.
    """

    rank: int
    num_layers: tuple[int, ...]
    is_first: bool
    is_last: bool
    layers: tuple[int, ...]


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.run.dtype == "bfloat16" else FLOAT_BYTES


def rank_stages(split: tuple[int, ...], pipeline: int) -> list[RankStages]:
    """The stages of every pipeline rank; stage k is on rank k modulo `pipeline`.

    Args:
        split: backbone layers of every stage (`parallel/stage_split.py`).
        pipeline: pipeline-parallel ranks.
    """
    ends = [*itertools.accumulate(split)]
    of_stage = [range(end - length, end) for end, length in zip(ends, split, strict=True)]
    return [
        RankStages(
            rank=rank,
            num_layers=split[rank::pipeline],
            is_first=rank == 0,
            is_last=rank == pipeline - 1,
            layers=tuple(itertools.chain(*of_stage[rank::pipeline])),
        )
        for rank in range(pipeline)
    ]


def table_elements(config: RunConfig, vocab_size: int) -> int:
    """Elements of a rank's part of a table of the vocabulary, padding included."""
    tensor = config.parallel.tensor
    return (vocab_size + -vocab_size % tensor) // tensor * config.model.hidden_size


def layer_elements(config: RunConfig) -> int:
    """Elements of a rank's part of one backbone layer."""
    model, tensor = config.model, config.parallel.tensor
    query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    matrices = model.hidden_size * (2 * query_size + 2 * kv_size + 3 * model.ffn_size)
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.parts.has_query_key_norms else 0)
    return matrices // tensor + norms


def projector_elements(config: RunConfig) -> int:
    """Elements of a rank's part of the projector of bits."""
    model, tensor = config.model, config.parallel.tensor
    stacked = 1 if model.parts.projector == "gelu" else 2
    first = stacked * model.projector_size * (config.vision.num_bits + 1)
    return (first + model.projector_size * model.hidden_size) // tensor + model.hidden_size


def head_elements(config: RunConfig) -> int:
    """Elements of a rank's part of the head, its table of cells included."""
    head, model, tensor = config.head, config.model, config.parallel.tensor
    bits, cond = config.vision.num_bits, model.hidden_size
    if head.kind == "bitwise":
        return (cond + 1) * 2 * bits
    width, hidden = head.width, head.mlp_size
    attends = model.parts.head_attends(config.vision.block_tokens)
    modulations = head.num_adaln * (NUM_MODULATIONS if attends else NUM_TOKEN_MODULATIONS) + 2
    split = modulations * (width + 1) * width + (cond + 1) * width
    split += head.num_blocks * (2 * hidden * (width + 1) + hidden * width)
    # Norms, and biases of linears whose input is divided.
    repeated = head.num_blocks * (2 * width + width)
    if attends:
        split += head.num_blocks * (3 * width * (width + 1) + width * width)
        repeated += head.num_blocks * (2 * width + width)
    repeated += (bits + 1) * width + (NUM_TIME_FEATURES + 1) * width + (width + 1) * width + (width + 1) * bits
    if model.parts.head_cells == "learned":
        repeated += config.classes.num_cells * cond
    return split // tensor + repeated


def rank_elements(config: RunConfig, vocab_size: int, stages: RankStages) -> int:
    """Elements of all parameters of the network that a rank holds; adapters are beside it (`adapters.py`)."""
    parts, hidden = config.model.parts, config.model.hidden_size
    total = sum(stages.num_layers) * layer_elements(config)
    if stages.is_first:
        total += table_elements(config, vocab_size) + projector_elements(config)
        total += hidden if parts.has_input_norm else 0
    if stages.is_last:
        total += head_elements(config) + hidden
        if parts.has_text and not config.model.tie_embeddings:
            total += table_elements(config, vocab_size)
    return total
