"""The head of a network: what predicts the bits of a block."""

from __future__ import annotations

from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.model.bit_head import BitHead
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import LinearFactory

Head = DiffusionHead | BitHead


def make_head(config: RunConfig | NetworkConfig, linears: LinearFactory, *, is_compiled: bool = False) -> Head:
    """The head of a network, by `head.kind` and the network's family.

    Args:
        config: sizes and family.
        linears: makes the linears, plain or tensor-parallel.
        is_compiled: whether the elementwise parts of the diffusion head are compiled.
    """
    hidden, vision, family = config.model.hidden_size, config.vision, config.model.parts
    if config.head.kind == "bitwise":
        return BitHead(hidden, vision.num_bits, linears)
    return DiffusionHead(
        config.head,
        hidden,
        vision.num_bits,
        vision.block_tokens,
        linears,
        output=family.head_output,
        has_attention=family.head_attends(vision.block_tokens),
        is_compiled=is_compiled,
    )
