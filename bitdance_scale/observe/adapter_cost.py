"""What adapters cost, and what frozen weights save: FLOPs of a step with `lora`.

A frozen linear forms the gradient of its input alone, half of a backward pass, and not even that before the first layer
in which something is trained. Of the frozen head all products count so, though those of its inputs need no gradient
(below 1 %).
"""

from __future__ import annotations

import functools
import re

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.model.adaptable import AdaptableLinear, targets
from bitdance_scale.model.published_names import Part

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@functools.lru_cache(maxsize=4)
def adapted_linears(network: NetworkConfig, vocab_size: int, section: LoraSection) -> tuple[AdaptableLinear, ...]:
    """The linears that have an adapter."""
    return tuple(targets(network, vocab_size, section.targets))


def adapter_flops(config: RunConfig, vocab_size: int, num_positions: int, num_predicted: int, num_blocks: int) -> int:
    """Forward FLOPs of all adapters; the counts are those of `PackCounts`."""
    return round(
        sum(
            2 * adapter_weights(config, linear) * linear_rows(config, linear, num_positions, num_predicted, num_blocks)
            for linear in adapted_linears(config.network, vocab_size, config.lora)
        )
    )


def adapter_weights(config: RunConfig, linear: AdaptableLinear) -> int:
    """Elements of both matrices of an adapter."""
    return config.lora.rank * (linear.in_size + linear.out_size)


def linear_rows(
    config: RunConfig, linear: AdaptableLinear, num_positions: float, num_predicted: float, num_blocks: float
) -> float:
    """Rows that a linear multiplies; the counts are those of `PackCounts`."""
    num_draws = config.head.diff_batch_mul
    if linear.part is not Part.HEAD:
        return num_positions
    if linear.name.endswith(".cond_embed"):
        return num_predicted
    return num_draws * (num_blocks if ".time_embed." in linear.name else num_predicted)


def backward_share(config: RunConfig, vocab_size: int) -> float:
    """Share of the layers of the backbone that a backward pass goes through, the last ones."""
    if config.lora.train_projector or config.lora.train_queries:
        return 1.0
    layers = [
        int(match[1])
        for linear in adapted_linears(config.network, vocab_size, config.lora)
        if (match := _LAYER.match(linear.ours))
    ]
    num_layers = config.model.num_layers
    return (num_layers - min(layers, default=num_layers)) / num_layers


def trained_elements(config: RunConfig, vocab_size: int, projector: int) -> int:
    """Elements of all that is trained; `projector`: those of the projector."""
    linears = adapted_linears(config.network, vocab_size, config.lora)
    total = sum(adapter_weights(config, linear) for linear in linears)
    total += projector if config.lora.train_projector else 0
    return total + (config.vision.block_tokens - 1) * config.model.hidden_size * int(config.lora.train_queries)
