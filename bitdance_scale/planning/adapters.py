"""What adapters and frozen weights are on a rank: elements, bytes, and the layers that a backward pass goes through."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from bitdance_scale.config.lora_schema import BLOCK_SIZE, UNQUANTISED_BITS, LoraSection
from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.model.adaptable import AdaptableLinear, linears_of
from bitdance_scale.model.published_names import our_tensors
from bitdance_scale.model.quantised import NF4_LEVELS, can_quantise
from bitdance_scale.observe.adapter_cost import adapted_linears
from bitdance_scale.planning.parameters import (
    FLOAT_BYTES,
    RankStages,
    element_bytes,
    projector_elements,
    rank_elements,
)

ROW_BYTES = 8
"""Bytes of the place of a row in a linear that stacks several published ones (`parallel/adapter.py`)."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# What tensor-parallel ranks divide, by the last part of our names; of other linears of the head they divide the output
# and gather it, or nothing.
_OUTPUT = ("linear_qkv", "linear_fc1", "wqkv", "w1")
_INPUT = ("linear_proj", "linear_fc2", "wo", "w2")
_GATHERED = re.compile(r"\.(cond_embed|ada_ln_blocks\.\d+|ada_ln_modulation)\.weight$")


@dataclass(frozen=True)
class Linear:
    """One of our linears of backbone or head.

    Attributes:
        name: global name of its weight.
        out_size, in_size: of the whole weight.
        layer: of the backbone; None: it is of the head.
        num_parts: published linears that it stacks.
        adapted: those of them that have an adapter.
    """

    name: str
    out_size: int
    in_size: int
    layer: int | None
    num_parts: int
    adapted: tuple[AdaptableLinear, ...]

    @property
    def divides_output(self) -> bool:
        """Whether ranks divide its output and do not gather it."""
        return self._leaf in _OUTPUT

    @property
    def divides_input(self) -> bool:
        """Whether ranks divide its input."""
        return self._leaf in _INPUT

    @property
    def is_in_block(self) -> bool:
        """Whether it is in a block of the head."""
        return ".res_blocks." in self.name

    @property
    def _leaf(self) -> str:
        return self.name.removesuffix(".weight").rpartition(".")[2]

    def elements(self, tensor: int) -> int:
        """Elements of a rank's part of the weight."""
        is_divided = self.divides_output or self.divides_input or _GATHERED.search(self.name) is not None
        return self.out_size * self.in_size // (tensor if is_divided else 1)

    def adapter_elements(self, rank: int, tensor: int) -> int:
        """Elements of a rank's part of its adapters."""
        total = 0
        for linear in self.adapted:
            total += rank * linear.in_size // (tensor if self.divides_input else 1)
            total += rank * linear.out_size // (tensor if self.divides_output else 1)
        return total


@dataclass(frozen=True)
class RankParameters:
    """The parameters of a rank.

    Attributes:
        elements: of all of them, in training dtype but for `saved_bytes`.
        trained: elements of those that are trained.
        saved_bytes: what quantised weights take less than in training dtype.
        table_bytes: of the places of rows in stacked linears.
    """

    elements: int
    trained: int
    saved_bytes: int = 0
    table_bytes: int = 0


@functools.lru_cache(maxsize=4)
def _linears(network: NetworkConfig, vocab_size: int, section: LoraSection) -> tuple[Linear, ...]:
    adapted = {linear.name for linear in adapted_linears(network, vocab_size, section)}
    found = []
    for tensor in our_tensors(network, vocab_size):
        if parts := linears_of(tensor):
            match = _LAYER.match(tensor.name)
            found.append(
                Linear(
                    name=tensor.name,
                    out_size=tensor.shape[0],
                    in_size=tensor.shape[1],
                    layer=None if match is None else int(match[1]),
                    num_parts=len(parts),
                    adapted=tuple(part for part in parts if part.name in adapted),
                )
            )
    return tuple(found)


def rank_linears(config: RunConfig, vocab_size: int, stages: RankStages) -> list[Linear]:
    """The linears of a rank's layers, and on the last rank those of the head."""
    layers = set(stages.layers)
    return [
        linear
        for linear in _linears(config.network, vocab_size, config.lora)
        if (stages.is_last if linear.layer is None else linear.layer in layers)
    ]


def rank_parameters(config: RunConfig, vocab_size: int, stages: RankStages) -> RankParameters:
    """What a rank holds, and what of it is trained: all without adapters."""
    whole, lora, tensor = rank_elements(config, vocab_size, stages), config.lora, config.parallel.tensor
    if not lora.is_used:
        return RankParameters(whole, whole)
    linears = rank_linears(config, vocab_size, stages)
    added = sum(linear.adapter_elements(lora.rank, tensor) for linear in linears)
    if stages.is_first and lora.train_queries:
        added += (config.vision.block_tokens - 1) * config.model.hidden_size
    trained = added + (projector_elements(config) if stages.is_first and lora.train_projector else 0)
    stacked = [linear for linear in linears if linear.adapted and linear.num_parts > 1]
    return RankParameters(
        elements=whole + added,
        trained=trained,
        saved_bytes=sum(saved_bytes(config, linear) for linear in linears),
        table_bytes=sum(ROW_BYTES * linear.out_size // tensor for linear in stacked),
    )


def is_quantised(config: RunConfig, linear: Linear) -> bool:
    """Whether a run keeps a linear in few bits."""
    return config.lora.base_bits < UNQUANTISED_BITS and can_quantise((linear.out_size, linear.in_size))


def saved_bytes(config: RunConfig, linear: Linear) -> int:
    """What a rank's part of a linear takes less than in training dtype: codes, a scale per block, and the levels."""
    if not is_quantised(config, linear):
        return 0
    size = element_bytes(config)
    bits, elements = config.lora.base_bits, linear.elements(config.parallel.tensor)
    levels = FLOAT_BYTES * len(NF4_LEVELS) if bits == 4 else 0
    return elements * size - elements * bits // 8 - elements // BLOCK_SIZE * size - levels


def num_backward_layers(config: RunConfig, vocab_size: int, stages: RankStages) -> int:
    """Layers of a rank through which a backward pass goes: all, but for frozen ones before the first trained weight.

    A later stage of a pipeline passes a gradient back to the one before it, whatever is trained there.
    """
    num_layers, lora = sum(stages.num_layers), config.lora
    if not lora.is_used or not stages.is_first or lora.train_projector or lora.train_queries:
        return num_layers
    first_stage = set(stages.layers[: stages.num_layers[0]])
    adapted = [
        linear.layer
        for linear in rank_linears(config, vocab_size, stages)
        if linear.adapted and linear.layer in first_stage
    ]
    return num_layers - sum(layer < min(adapted, default=stages.num_layers[0]) for layer in first_stage)
