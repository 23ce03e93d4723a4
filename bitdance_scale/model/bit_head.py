"""The bit-wise classification head: every bit of a block by itself (arXiv 2602.14041 Sec. 4.2, Table 13).

An ablation of the diffusion head. It is one linear to two logits per bit, trained with cross-entropy. The bits of a
block are independent given the backbone's hidden states, so it cannot draw what they have in common.

Shape suffixes: B blocks, P tokens per block, C bits, Z condition size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bitdance_scale.model.linears import LinearFactory


class BitHead(nn.Module):
    """Two logits per bit: for -1 and for 1.

    Args:
        cond_size: width Z of the condition, the backbone's hidden size.
        num_bits: C.
        linears: makes the linear; every tensor-parallel rank has all of it.
    """

    def __init__(self, cond_size: int, num_bits: int, linears: LinearFactory) -> None:
        super().__init__()
        self.linear = linears.replicated(cond_size, 2 * num_bits)

    def forward(self, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """The log odds of a 1 against a -1, float32 [B, P, C]."""
        negative_BPC, positive_BPC = self.linear(cond_BPZ.to(self.linear.bias.dtype)).float().chunk(2, dim=-1)
        return positive_BPC - negative_BPC

    def losses(
        self,
        cond_BPZ: torch.Tensor,
        clean_BPC: torch.Tensor,
        noise_KBPC: torch.Tensor,
        t_KB: torch.Tensor,
        reports_blocks: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The cross-entropy of the bits in nats; as `DiffusionHead.losses`, but noise and times are not used."""
        loss_BPC = functional.softplus(-clean_BPC.float() * self(cond_BPZ))
        return loss_BPC.sum() / loss_BPC.shape[-1], loss_BPC.mean(dim=(1, 2)) if reports_blocks else None
