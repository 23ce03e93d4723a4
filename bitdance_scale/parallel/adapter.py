"""The adapter of a linear on one tensor-parallel rank.

A linear of ours may stack several published ones, each with an adapter of its own or none. Their A matrices are stacked
as well and multiply the input once; their B matrices stand in the rows of their linears and in columns of their own, so
that one product adds the change of all.

Tensor-parallel ranks divide what the linear divides: B where it divides its output, A where it divides its input. What
they exchange has `rank` channels. Under sequence parallelism a rank multiplies A, or B, by its own positions, so that
the gradient of that matrix must be summed over the ranks, as for the weight of a norm (`partial_gradients.py`).

Shape suffixes: N positions or tokens, D input features of this rank, C output features of this rank, R ranks of all
adapters of the linear.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn
from torch.nn import functional

from bitdance_scale.model.low_rank import current_rows, dropped_linear, matrix_names, mixed, name_key
from bitdance_scale.parallel.partition import Placement


class Split(enum.Enum):
    """What tensor-parallel ranks divide of a linear."""

    OUTPUT = "output"
    INPUT = "input"
    NOTHING = "nothing"


def split_of(linear: nn.Module) -> Split:
    """What tensor-parallel ranks divide of a linear, as its output is seen; a gathered one is whole on every rank."""
    if isinstance(linear, RowParallelLinear):
        return Split.INPUT
    if isinstance(linear, ColumnParallelLinear) and not linear.gather_output:
        return Split.OUTPUT
    return Split.NOTHING


@dataclass(frozen=True)
class AdaptedPart:
    """A published linear within one of ours, on this rank.

    Attributes:
        key: tells it from others in the linear.
        a, b: where its matrices lie in the whole ones.
    """

    key: str
    a: Placement
    b: Placement


@dataclass(frozen=True)
class AdaptedLinear:
    """What an adapter knows of its linear.

    Attributes:
        name: global name of the linear.
        split: what ranks divide of it.
        is_sequence_parallel: whether ranks divide the positions before or after it.
        first_channel: the first input feature of this rank.
        order: of every output feature of this rank, its row in the stacked B matrices of the parts, or their number of
            rows where its part has no adapter; None: the rows of the only part.
    """

    name: str
    split: Split
    is_sequence_parallel: bool
    first_channel: int
    order: Sequence[int] | None


class Adapter(nn.Module):
    """The change of a linear.

    Args:
        linear: what it belongs to.
        parts: published linears in it that are adapted.
        scale: what the product of the matrices is multiplied by.
        dropout: share of the inputs that are dropped in training.
        dtype: of the matrices.
        tensor_rank: this rank.
        tensor_size: tensor-parallel ranks.

    Attributes:
        placements: parameter -> where it lies in the whole one.
        sequence_parallel: whether ranks divide the positions; switched off in decoding (`whole_sequences`).
        sums_in_backward: whether the gradients of `partial_parameters` are summed over tensor-parallel ranks inside
            autograd.
    """

    order: torch.Tensor
    channels: torch.Tensor

    def __init__(
        self,
        linear: AdaptedLinear,
        parts: Sequence[AdaptedPart],
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        tensor_rank: int,
        tensor_size: int,
    ) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, dropout
        self.keys = [part.key for part in parts]
        self.placements: Mapping[str, Placement] = {
            name: placement
            for part in parts
            for name, placement in zip(matrix_names(part.key), (part.a, part.b), strict=True)
        }
        for name, placement in self.placements.items():
            self.register_parameter(name, nn.Parameter(torch.empty(placement.local_shape, dtype=dtype)))
        self._tensor_rank, self._is_split = tensor_rank, tensor_size > 1 and linear.split is not Split.NOTHING
        self.sequence_parallel = linear.is_sequence_parallel and self._is_split
        self.sums_in_backward = self.sequence_parallel
        in_size = parts[0].a.local_shape[1]
        if linear.order is not None:
            self.register_buffer("order", torch.tensor(linear.order), persistent=False)
        if dropout:
            channels = torch.arange(linear.first_channel, linear.first_channel + in_size) + name_key(linear.name)
            self.register_buffer("channels", mixed(channels), persistent=False)

    @property
    def partial_parameters(self) -> list[nn.Parameter]:
        """Replicated parameters of whose gradients every rank computes a part under sequence parallelism."""
        if self.linear.split is Split.NOTHING:
            return []
        number = 0 if self.linear.split is Split.OUTPUT else 1
        return [self._parameter(matrix_names(key)[number]) for key in self.keys]

    def forward(self, input_: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output with the change added to it.

        Args:
            input_: [.., D], of the linear.
            output: [.., C], of the linear.

        Returns:
            [.., C].
        """
        a_RD = self._whole([self._parameter(matrix_names(key)[0]) for key in self.keys], Split.OUTPUT)
        b_CR = self._placed_rows()
        low = self._down(input_, a_RD)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b_CR.t(), alpha=self.scale).view_as(output)

    def _down(self, input_: torch.Tensor, a_RD: torch.Tensor) -> torch.Tensor:
        """A x, [.., R], of the positions of the output."""
        rows = current_rows() if self.dropout and torch.is_grad_enabled() else None
        if rows is None:
            low = functional.linear(input_, a_RD)
        else:
            flat = input_.flatten(0, -2)
            rows = self._own_rows(rows, len(flat))
            low = dropped_linear(flat, a_RD, rows, self.channels, self.dropout).view(*input_.shape[:-1], -1)
        if not self._is_split:
            return low
        if self.linear.split is Split.OUTPUT:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
            return copy_to_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low)
        return reduce_from_tensor_model_parallel_region(low)

    def _own_rows(self, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The keys of this rank's positions, [N]. A condition has those of the first draw of its blocks."""
        first = 0
        if self.sequence_parallel and self.linear.split is Split.OUTPUT:
            first = self._tensor_rank * num_rows
        return rows.narrow(0, first, num_rows)

    def _placed_rows(self) -> torch.Tensor:
        """The B matrices in the rows of their linears and in columns of their own, [C, R]."""
        parts = [self._parameter(matrix_names(key)[1]) for key in self.keys]
        if self.linear.order is None:
            return self._whole(parts, Split.INPUT)
        rank = parts[0].shape[1]
        columns = [
            functional.pad(part, (number * rank, (len(parts) - 1 - number) * rank)) for number, part in enumerate(parts)
        ]
        # A row of zeros is where the linears without an adapter take theirs from.
        stacked = torch.cat([*columns, columns[0].new_zeros(1, len(parts) * rank)])
        return self._summed(stacked, Split.INPUT).index_select(0, self.order)

    def _whole(self, parts: Sequence[torch.Tensor], partial_where: Split) -> torch.Tensor:
        """Matrices as one, whose gradient is summed over the ranks where each computes a part of it."""
        return self._summed(parts[0] if len(parts) == 1 else torch.cat(list(parts)), partial_where)

    def _summed(self, matrix: torch.Tensor, partial_where: Split) -> torch.Tensor:
        is_partial = self.sums_in_backward and self.linear.split is partial_where
        # A view, because ZeRO-3 takes the parameter away after this call.
        return copy_to_tensor_model_parallel_region(matrix) if is_partial else matrix.view_as(matrix)

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = getattr(self, name)
        assert isinstance(parameter, nn.Parameter)
        return parameter


def attach(linear: nn.Module, adapter: Adapter) -> None:
    """Makes a linear add what its adapter gives; the adapter's parameters are then the linear's."""
    linear.adapter = adapter
    linear.register_forward_hook(_add)


def _add(linear: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    """Adds the change to what a linear returns; Megatron-core's return the bias beside it."""
    adapter = linear.adapter
    assert isinstance(adapter, Adapter)
    if isinstance(output, tuple):
        return adapter(inputs[0], output[0]), *output[1:]
    return adapter(inputs[0], output)
