"""Tensor-parallel linear layers for the diffusion head and the projector.

They wrap Megatron-core's column- and row-parallel layers in the factory from which `model/` gets its linears. Model
code therefore needs no process groups.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn

from bitdance_scale.parallel.topology import Topology


def _no_init(tensor: torch.Tensor) -> torch.Tensor:
    """Megatron-core requires an initialiser but never calls it here; `parallel/build.py` fills every weight."""
    return tensor


class ColumnLinear(ColumnParallelLinear):
    """Output features split over tensor-parallel ranks.

    The weight stacks `num_chunks` matrices, and each is split separately: the local weight holds this rank's part of
    the first matrix, then of the second, and so on.
    """

    def __init__(
        self, in_size: int, out_size: int, num_chunks: int, gather_output: bool, bias: bool, config: TransformerConfig
    ) -> None:
        assert not (gather_output and num_chunks > 1), "gathering would interleave the stacked matrices"
        super().__init__(in_size, out_size, config=config, init_method=_no_init, bias=bias, gather_output=gather_output)
        self.num_chunks = num_chunks

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[.., in_size] -> [.., out_size / tensor ranks], or [.., out_size] if gathered."""
        return _plain(self, input_) if _is_whole(self) else super().forward(input_)[0]


class RowLinear(RowParallelLinear):
    """Input features split over tensor-parallel ranks; the partial products are summed, then the bias is added."""

    def __init__(self, in_size: int, out_size: int, config: TransformerConfig) -> None:
        super().__init__(
            in_size,
            out_size,
            config=config,
            init_method=_no_init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[.., in_size / tensor ranks] -> [.., out_size]."""
        return _plain(self, input_) if _is_whole(self) else super().forward(input_)[0]


def _is_whole(linear: ColumnLinear | RowLinear) -> bool:
    """Whether nothing is exchanged, neither now nor in a backward pass."""
    return linear.config.tensor_model_parallel_size == 1 and not torch.is_grad_enabled()


def _plain(linear: ColumnLinear | RowLinear, input_: torch.Tensor) -> torch.Tensor:
    """What Megatron-core's layer computes on one rank, bit for bit, without its copy of the output for the bias."""
    output = torch.matmul(input_, linear.weight.t())
    return output if linear.bias is None else output.add_(linear.bias)


def without_sequence_parallel(megatron: TransformerConfig) -> TransformerConfig:
    """The same configuration, for modules whose whole input every tensor-parallel rank has."""
    whole = copy.copy(megatron)
    whole.sequence_parallel = False
    return whole


class TensorParallelLinears:
    """The linear factory of `model/` over the tensor-parallel group.

    The head and the projector work on blocks and vision tokens rather than positions, so sequence parallelism ends
    before them and every rank has their whole input.
    """

    def __init__(self, megatron: TransformerConfig, topology: Topology) -> None:
        self.num_partitions = topology.tensor_size
        self._megatron = without_sequence_parallel(megatron)

    def column(self, in_size: int, out_size: int, *, num_chunks: int = 1, gather_output: bool = False) -> nn.Module:
        """A linear whose output features are split over the ranks."""
        return ColumnLinear(in_size, out_size, num_chunks, gather_output, bias=True, config=self._megatron)

    def row(self, in_size: int, out_size: int) -> nn.Module:
        """A linear whose input features are split over the ranks."""
        return RowLinear(in_size, out_size, self._megatron)

    def replicated(self, in_size: int, out_size: int) -> nn.Linear:
        """A linear that every rank holds and computes whole."""
        return nn.Linear(in_size, out_size, dtype=self._megatron.params_dtype)
