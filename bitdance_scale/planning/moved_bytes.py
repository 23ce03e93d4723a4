"""Bytes that elementwise kernels read and write, and how many kernels there are, as the model computes today: eagerly.

The numbers per position and channel are traced, not derived: every kernel of two runs that differ by one layer was
logged with the bytes of its inputs and outputs, at 1 and at 4 tensor-parallel ranks, in bfloat16 and float32, and the
differences were split by width. The split reproduces the traces within 2 % (`tests/unit/planning/test_moved_bytes.py`).
Fusing kernels changes them: then trace again.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.planning.parameters import RankStages
from bitdance_scale.planning.rank_memory import (
    FLOAT_BYTES,
    element_bytes,
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
    """

    forward: float
    backward: float

    def training(self, num_repeated: int) -> float:
        """Both passes, the forward one repeated so many times by recomputation."""
        return self.forward * (1 + num_repeated) + self.backward


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes per position and channel of one pass through a backbone layer.

    Attributes:
        hidden: channels of the residual stream, at the positions that a rank holds: two norms, two residuals.
        query_key: channels of queries and keys: norms and rotation.
        query: channels of queries: what surrounds attention.
        ffn: channels of the feed-forward: SwiGLU.
        head_dim: channels of one head: cosines and sines.
    """

    hidden: float
    query_key: float
    query: float
    ffn: float
    head_dim: float


_LAYER = {
    2: (_LayerBytes(84, 71.5, 14, 10, 96), _LayerBytes(187, 130.5, 0, 26, 0)),
    4: (_LayerBytes(80, 97.6, 28, 20, 96), _LayerBytes(218, 146, 0, 52, 0)),
}
"""Bytes of an element -> forward, backward."""
# Per token, channel and byte of an element: (what every rank computes, what the ranks divide) in a block of the head.
_HEAD_BLOCK = ((36.0, 19.5), (56.0, 37.5))
# Of the rest of the head: positions, noise, modulations; forward, backward.
_HEAD_REST = (146.0, 65.0)
# Bytes per logit of the cross-entropy, which is in float32: forward, backward.
_LOGIT = (46.0, 24.0)

LAYER_KERNELS = BothPasses(72, 92)
HEAD_BLOCK_KERNELS = BothPasses(24, 62)
REST_KERNELS = BothPasses(112, 150)
"""Kernels of embedding, projector, the rest of the head, and losses."""
PARAMETERS_PER_LAYER, VECTORS_PER_LAYER = 8, 4


def layer_bytes(config: RunConfig, num_positions: float) -> BothPasses:
    """Of one backbone layer on one rank, at so many positions of a pack."""
    model, tensor = config.model, config.parallel.tensor
    query, kv = model.num_heads * model.head_dim / tensor, model.num_kv_heads * model.head_dim / tensor
    hidden = local_positions(config, 1) * model.hidden_size
    passes = [
        num_positions
        * (
            hidden * per.hidden
            + (query + kv) * per.query_key
            + query * per.query
            + model.ffn_size / tensor * per.ffn
            + model.head_dim * per.head_dim
        )
        for per in _LAYER[element_bytes(config)]
    ]
    return BothPasses(*passes)


def head_block_bytes(config: RunConfig, num_tokens: float) -> BothPasses:
    """Of one block of the diffusion head, at so many tokens and draws."""
    unit = num_tokens * config.head.width * element_bytes(config)
    return BothPasses(*(unit * (whole + divided / config.parallel.tensor) for whole, divided in _HEAD_BLOCK))


def head_rest_bytes(config: RunConfig, num_tokens: float) -> BothPasses:
    """Of the head outside of its blocks."""
    unit = num_tokens * config.head.width * element_bytes(config)
    return BothPasses(*(unit * per for per in _HEAD_REST))


def logits_bytes(config: RunConfig, vocab_size: int, num_text_targets: float) -> BothPasses:
    """Of the cross-entropy over a rank's part of the vocabulary."""
    num_logits = num_text_targets * vocab_size / config.parallel.tensor
    return BothPasses(*(num_logits * per for per in _LOGIT))


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


def micro_kernels(config: RunConfig, stages: RankStages) -> float:
    """Kernels of one micro-batch on a rank."""
    repeated = int(config.parallel.recompute == "full")
    accumulate = PARAMETERS_PER_LAYER * (2 if element_bytes(config) == 2 else 1)
    if is_megatron_engine(config):
        accumulate = VECTORS_PER_LAYER
    kernels = sum(stages.num_layers) * (LAYER_KERNELS.training(repeated) + accumulate)
    if stages.is_last:
        kernels += config.head.num_blocks * HEAD_BLOCK_KERNELS.training(repeated) + REST_KERNELS.training(0)
    return kernels
