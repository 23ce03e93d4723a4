"""Bytes that elementwise kernels read and write, and how many kernels there are, compiled or not.

The numbers per position and channel are those of the formulas in `model/fused.py`: compiled, a formula reads its
arguments and writes its results; uncompiled, each of its operators does. They reproduce the trace of two runs that
differ by one layer, or by two blocks of the head, in which every kernel was logged with the bytes of its inputs and
outputs (`tests/unit/planning/test_moved_bytes.py`). Changing a formula changes them: then trace again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.planning.adapters import Linear, is_quantised, num_backward_layers, rank_linears
from bitdance_scale.planning.parameters import FLOAT_BYTES, RankStages, element_bytes
from bitdance_scale.planning.rank_memory import (
    is_megatron_engine,
    local_positions,
    reduced_bytes,
    scatters_gradients,
)


@dataclass(frozen=True)
class BothPasses:
    """A quantity of the forward and of the backward pass.

    Attributes:
        forward: of one forward pass.
        backward: of one backward pass, recomputation left out.
        again: of what selective recomputation repeats.
    """

    forward: float
    backward: float
    again: float = 0.0

    def training(self, recompute: str) -> float:
        """Both passes, with what `parallel.recompute` repeats."""
        repeated = {"none": 0.0, "selective": self.again, "full": self.forward}
        return self.forward + repeated[recompute] + self.backward


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes per position and channel of one pass through a backbone layer.

    Attributes:
        hidden: channels of the residual stream, at the positions that a rank holds: two norms, two residuals.
        query: channels of queries: norms and rotation.
        key_value: channels of keys, of which there are as many of values.
        ffn: channels of the feed-forward: SwiGLU.
        head_dim: channels of one head: cosines and sines.
    """

    hidden: float
    query: float
    key_value: float
    ffn: float
    head_dim: float


def _compiled_layer(size: int) -> tuple[_LayerBytes, _LayerBytes, _LayerBytes]:
    """Forward, backward and what selective recomputation repeats, with elements of so many bytes."""
    passes = ((9, 2, 3, 3, 1), (8, 3, 6, 5, 1), (4, 2, 3, 3, 1))
    forward, backward, again = (_LayerBytes(*(size * number for number in numbers)) for numbers in passes)
    return forward, backward, again


_LAYER: Mapping[tuple[bool, int], tuple[_LayerBytes, _LayerBytes, _LayerBytes]] = {
    (False, 2): (
        _LayerBytes(84, 54, 54, 10, 8),
        _LayerBytes(236, 130, 134, 30, 8),
        _LayerBytes(72, 54, 54, 10, 8),
    ),
    (False, 4): (
        _LayerBytes(80, 64, 64, 20, 16),
        _LayerBytes(216, 140, 148, 60, 16),
        _LayerBytes(56, 64, 64, 20, 16),
    ),
    (True, 2): _compiled_layer(2),
    (True, 4): _compiled_layer(4),
}
"""(whether it is compiled, bytes of an element) -> forward, backward, repeated."""
# Whether it is compiled -> forward, backward, per token, channel and byte of an element in a block of the head: (what
# every rank computes, what the ranks divide).
_HEAD_BLOCK = {False: ((36.0, 19.5), (64.0, 40.5)), True: ((19.0, 16.5), (41.0, 25.5))}
# Of the rest of the head: positions, noise, modulations, the norms before and within its last layer.
_HEAD_REST = {False: (81.0, 71.0), True: (69.0, 42.0)}
# Bytes per logit of the cross-entropy: forward, backward.
_LOGIT = {(False, 2): (52.0, 72.0), (False, 4): (56.0, 78.0), (True, 2): (4.0, 4.0), (True, 4): (8.0, 8.0)}

LAYER_KERNELS = {False: BothPasses(55, 119, 48), True: BothPasses(10, 13, 4)}
HEAD_BLOCK_KERNELS = {False: BothPasses(23, 66), True: BothPasses(13, 49)}
REST_KERNELS = {False: BothPasses(122, 142), True: BothPasses(90, 101)}
"""Kernels of embedding, projector, the rest of the head, and losses, by whether formulas are compiled."""
PARAMETERS_PER_LAYER, VECTORS_PER_LAYER = 8, 4
FROZEN_LAYER_KERNELS = {False: 12, True: 4}
"""Kernels of a backward pass that a layer of frozen weights lacks: products for them, and sums for those of norms."""


def layer_bytes(config: RunConfig, num_positions: float) -> BothPasses:
    """Of one backbone layer on one rank, at so many positions of a pack."""
    model, tensor = config.model, config.parallel.tensor
    query, kv = model.num_heads * model.head_dim / tensor, model.num_kv_heads * model.head_dim / tensor
    hidden = local_positions(config, 1) * model.hidden_size
    passes = [
        num_positions
        * (
            hidden * per.hidden
            + query * per.query
            + kv * per.key_value
            + model.ffn_size / tensor * per.ffn
            + model.head_dim * per.head_dim
        )
        for per in _LAYER[config.parallel.compile, element_bytes(config)]
    ]
    return BothPasses(*passes)


def head_block_bytes(config: RunConfig, num_tokens: float) -> BothPasses:
    """Of one block of the diffusion head, at so many tokens and draws."""
    unit, compiled = num_tokens * config.head.width * element_bytes(config), config.parallel.compile
    return BothPasses(*(unit * (whole + divided / config.parallel.tensor) for whole, divided in _HEAD_BLOCK[compiled]))


def head_rest_bytes(config: RunConfig, num_tokens: float) -> BothPasses:
    """Of the head outside of its blocks."""
    unit = num_tokens * config.head.width * element_bytes(config)
    return BothPasses(*(unit * per for per in _HEAD_REST[config.parallel.compile]))


def logits_bytes(config: RunConfig, vocab_size: int, num_text_targets: float) -> BothPasses:
    """Of the cross-entropy over a rank's part of the vocabulary."""
    num_logits = num_text_targets * vocab_size / config.parallel.tensor
    return BothPasses(*(num_logits * per for per in _LOGIT[config.parallel.compile, element_bytes(config)]))


def adapter_bytes(config: RunConfig, linear: Linear, num_rows: float) -> BothPasses:
    """Of the adapters of a linear: their products have so few channels that the memory limits them.

    Forward the input is read, and the output read and written. Backward two products read the gradient of the output,
    one the input; the gradient of the input is written and added to that of the linear.
    """
    if not linear.adapted:
        return BothPasses(0.0, 0.0)
    tensor = config.parallel.tensor
    in_size = linear.in_size / (tensor if linear.divides_input else 1)
    # Linears stacked with one that has an adapter get rows of zeros.
    out_size = linear.out_size / (tensor if linear.divides_output else 1)
    unit = num_rows * element_bytes(config)
    return BothPasses(unit * (in_size + 2 * out_size), unit * (5 * in_size + 2 * out_size))


def remade_bytes(config: RunConfig, linear: Linear) -> float:
    """Of making a quantised weight of its codes once; scales left out."""
    if not is_quantised(config, linear):
        return 0.0
    size, bits = element_bytes(config), config.lora.base_bits
    # Compiled, codes are read and weights written. Otherwise the operators of `model/quantised.py` do so one by one.
    operators = {8: 1 + 4 + 4 + 4, 4: 4 * 0.5 + 2 * 1 + 1 + 4 + 4 + 4 + 4 + 4}[bits] + (4 + size if size == 2 else 0)
    per_element = bits / 8 + size if config.parallel.compile else operators
    return linear.elements(config.parallel.tensor) * per_element


def adapter_kernels(config: RunConfig, linear: Linear) -> BothPasses:
    """Of the adapters of a linear, accumulation of their gradients included."""
    num = len(linear.adapted)
    if not num:
        return BothPasses(0, 0)
    accumulate = 2 * num * (2 if element_bytes(config) == 2 else 1)
    if linear.num_parts == 1:
        return BothPasses(2, 5 + accumulate)
    # Their matrices are put into the rows of the stacked linear, and those of the input into one.
    return BothPasses(5 + num if num > 1 else 5, 6 + num + accumulate)


def remade_kernels(config: RunConfig, linear: Linear) -> int:
    """Of making a quantised weight of its codes once."""
    if not is_quantised(config, linear):
        return 0
    return 1 if config.parallel.compile else {8: 5, 4: 8}[config.lora.base_bits]


def num_made(config: RunConfig) -> int:
    """How often a quantised weight is made for a micro-batch: for both passes, and where a layer is computed again."""
    return 3 if config.parallel.recompute == "full" else 2


def accumulated_bytes(config: RunConfig, num_elements: float) -> float:
    """What accumulating the gradients of one micro-batch moves.

    In bfloat16 a gradient is widened to float32 (2 + 4) and added to the accumulated one (4 + 4 + 4). In float32 it is
    added in place (4 + 4 + 4). ZeRO-2 and 3 first copy it into the bucket that is reduced. Under Megatron-core's engine
    the product of a split linear reads and writes the accumulated gradient itself (4 + 4); no other kernel does.
    """
    size = element_bytes(config)
    if is_megatron_engine(config):
        return num_elements * 2 * FLOAT_BYTES
    per_element = 18 if size == 2 else 12
    return num_elements * (per_element + (2 * size if config.parallel.zero_stage > 1 else 0))


def optimiser_bytes(config: RunConfig, num_elements: float, data_size: int) -> float:
    """What reducing, clipping and stepping move beside the messages, once per step.

    AdamW reads gradient, master and two moments and writes master, moments and weight (28 bytes and a weight) of the
    rank's partition; the norm reads the gradients, and clipping changes them. ZeRO-1 in bfloat16 averages the sums of
    the partition and clears all gradients twice; to send them in bfloat16 it converts all of them, and the partition
    back. In float32 it averages all gradients in a bucket and copies them back (32 bytes, traced), and clears them (4).
    Megatron-core's engine copies a rank's new weights (4 and a weight) and clears all gradients (4).
    """
    part, size = num_elements / data_size, element_bytes(config)
    moved = part * (28 + size + (12 if config.optim.average_decay else 0))
    if is_megatron_engine(config):
        return moved + part * (4 + 8 + 4) + num_elements * 4
    if scatters_gradients(config):
        moved += part * (4 + 8 + 8) + num_elements * 8
        return moved + (6 * (num_elements + part) if reduced_bytes(config) == size else 0)
    whole = num_elements if config.parallel.zero_stage == 1 else part
    return moved + whole * (4 + 32 + 4)


def micro_kernels(config: RunConfig, vocab_size: int, stages: RankStages) -> float:
    """Kernels of one micro-batch on a rank."""
    recompute, compiled = config.parallel.recompute, config.parallel.compile
    num_layers, layer = sum(stages.num_layers), LAYER_KERNELS[compiled]
    if config.lora.is_used:
        num_backward = num_backward_layers(config, vocab_size, stages)
        of_backward = layer.training(recompute) - FROZEN_LAYER_KERNELS[compiled]
        kernels = num_backward * of_backward + (num_layers - num_backward) * layer.forward
        repeats = "full" if recompute == "full" else "none"
        for linear in rank_linears(config, vocab_size, stages):
            kernels += adapter_kernels(config, linear).training(repeats)
            kernels += num_made(config) * remade_kernels(config, linear)
    else:
        accumulate = PARAMETERS_PER_LAYER * (2 if element_bytes(config) == 2 else 1)
        if is_megatron_engine(config):
            accumulate = VECTORS_PER_LAYER
        kernels = num_layers * (layer.training(recompute) + accumulate)
    if stages.is_last:
        of_block = HEAD_BLOCK_KERNELS[compiled].training(recompute)
        kernels += config.head.num_blocks * of_block + REST_KERNELS[compiled].training("none")
    return kernels
