"""The factory that makes the linears of the head and the projector.

The model says how each linear may be split. `PlainLinears` makes whole linears, `parallel/tensor_linears.py` split
ones.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn


class LinearFactory(Protocol):
    """Makes the linears of a model; each is called as `y = linear(x)` and has `weight` [out, in] and `bias` [out].

    Attributes:
        num_partitions: tensor-parallel ranks that share a split linear; 1 if none is split.
    """

    num_partitions: int

    def column(self, in_size: int, out_size: int, *, num_chunks: int = 1, gather_output: bool = False) -> nn.Module:
        """A linear whose output features are split over the ranks.

        Args:
            in_size: input features, whole on every rank.
            out_size: output features of all ranks together.
            num_chunks: matrices stacked along the output, each split separately: 3 for query, key and value, 2 for
                the gate and up halves of a SwiGLU. A rank's output stacks its part of every chunk.
            gather_output: whether every rank gets all output features rather than only its own.
        """
        ...

    def row(self, in_size: int, out_size: int) -> nn.Module:
        """A linear whose input features are split over the ranks; every rank gets the whole output."""
        ...

    def replicated(self, in_size: int, out_size: int) -> nn.Linear:
        """A linear that every rank holds and computes whole."""
        ...


class PlainLinears:
    """`nn.Linear` everywhere: the model on one device."""

    num_partitions = 1

    def column(self, in_size: int, out_size: int, *, num_chunks: int = 1, gather_output: bool = False) -> nn.Module:
        """A whole linear; on one rank chunks and gathering have no effect."""
        return nn.Linear(in_size, out_size)

    def row(self, in_size: int, out_size: int) -> nn.Module:
        """A whole linear."""
        return nn.Linear(in_size, out_size)

    def replicated(self, in_size: int, out_size: int) -> nn.Linear:
        """A whole linear."""
        return nn.Linear(in_size, out_size)
