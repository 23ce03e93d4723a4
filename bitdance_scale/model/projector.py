"""The entry of vision tokens into the backbone: bit flips, then a projector of two layers.

Shape suffixes: V vision tokens, C bits, D hidden size of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from bitdance_scale.config.schema import gated_projector_size
from bitdance_scale.model.fused_autograd import swiglu
from bitdance_scale.model.linears import LinearFactory


def flip_bits(bits_VC: torch.Tensor, level_VC: torch.Tensor, draw_VC: torch.Tensor, flip_max: float) -> torch.Tensor:
    """Flips input bits at random, so that the model learns to cope with sampling errors (published release).

    Args:
        bits_VC: -1 and 1; targets are never flipped.
        level_VC: float, u ~ U(0, 1) per element; the element flips with probability flip_max * u.
        draw_VC: float, U(0, 1) per element; decides the flip.
        flip_max: largest probability of a flip, in [0, 1].

    Returns:
        The bits with the sign changed where draw < flip_max * u, in the shape and dtype of `bits_VC`.
    """
    return torch.where(draw_VC < flip_max * level_VC, -bits_VC, bits_VC)


class Projector(nn.Module):
    """Linear, tanh-GELU, linear: from the bits of a vision token to the width of the backbone.

    Args:
        num_bits: C.
        hidden_size: D.
        linears: makes the linears, plain or tensor-parallel.
    """

    def __init__(self, num_bits: int, hidden_size: int, linears: LinearFactory) -> None:
        super().__init__()
        self.fc1 = linears.column(num_bits, hidden_size)
        self.fc2 = linears.row(hidden_size, hidden_size)

    def forward(self, bits_VC: torch.Tensor) -> torch.Tensor:
        """[V, C] of -1 and 1, any dtype -> [V, D] in the dtype of the parameters."""
        dtype = next(self.parameters()).dtype
        return self.fc2(functional.gelu(self.fc1(bits_VC.to(dtype)), approximate="tanh"))


class GatedProjector(nn.Module):
    """A SwiGLU from the bits of a vision token to the width of the backbone (published class-conditional release).

    Args:
        num_bits: C.
        hidden_size: D.
        linears: makes the linears, plain or tensor-parallel.
    """

    def __init__(self, num_bits: int, hidden_size: int, linears: LinearFactory) -> None:
        super().__init__()
        inner_size = gated_projector_size(hidden_size)
        self.w1 = linears.column(num_bits, 2 * inner_size, num_chunks=2)
        self.w2 = linears.row(inner_size, hidden_size)

    def forward(self, bits_VC: torch.Tensor) -> torch.Tensor:
        """[V, C] of -1 and 1, any dtype -> [V, D] in the dtype of the parameters."""
        return self.w2(swiglu(self.w1(bits_VC.to(next(self.parameters()).dtype)), False))


PROJECTORS: Mapping[str, type[Projector] | type[GatedProjector]] = {"gelu": Projector, "swiglu": GatedProjector}
"""By the names of `config/families.py`."""
