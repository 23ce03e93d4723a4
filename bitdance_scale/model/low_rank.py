"""Low-rank adaptation: the change of a linear, and which of its inputs are dropped in training.

A frozen weight W [out, in] acts as W + scale * B A, with A [rank, in] and B [out, rank] (arXiv 2106.09685, Eq. 3).

Dropout follows the rule of all noise (`sequence/noise.py`): whether an input is dropped depends on seed, step, sample,
position in it, linear and channel, and on no layout. A hash decides, computed again in the backward pass.

Shape suffixes: N positions or tokens, D input features of this rank, R ranks of all adapters that share an input.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

ADAPTER = ".adapter."
"""Within the global name of a matrix of an adapter, between the name of the linear and that of the matrix."""
# Of the finaliser of MurmurHash3 (64 bits), as signed numbers: the products wrap.
_FACTORS = (-49064778989728563, -4265267296055464877)
_SHIFT = 33
_LOW_BITS = (1 << (64 - _SHIFT)) - 1
# The hash decides by as many bits as a float32 resolves.
_RESOLUTION = 1 << 24
# 64 MiB of float32; the linears of small networks are one block.
_BLOCK_ELEMENTS = 1 << 24


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """A weight [out, in] with its adapter in it, in the weight's dtype: W + scale * (B A), computed in float32.

    It is computed in `row_blocks`, so that a caller who has one of them at a time finds the same bits.

    Args:
        weight: [out, in], any dtype.
        a: [rank, in].
        b: [out, rank].
        scale: what the product is multiplied by.
    """
    blocks = [
        changed_rows(weight[start:stop], [(a, b[start:stop], scale)]) for start, stop in row_blocks(*weight.shape)
    ]
    return torch.cat(blocks)


def changed_rows(rows: torch.Tensor, changes: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    """One of `row_blocks` of a weight [N, in] with adapters in it, one after the other, in the dtype of the weight.

    Args:
        rows: [N, in], any dtype.
        changes: A [rank, in], the same rows of B [N, rank], and what their product is multiplied by, of each.
    """
    # Copies: how a product rounds may depend on where its factors lie in memory.
    whole = rows.to(torch.float32, copy=True)
    for a, b, scale in changes:
        whole += (b.to(torch.float32, copy=True) @ a.to(torch.float32, copy=True)) * scale
    return whole.to(rows.dtype)


def row_blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a weight that are merged at a time; how a product rounds depends on its shape."""
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def matrix_names(key: str) -> tuple[str, str]:
    """The names of A and B of a published linear within the adapter of its linear; `key` tells it from others there."""
    return f"{key}_lora_A", f"{key}_lora_B"


def initial_bound(in_size: int) -> float:
    """A begins uniformly within plus and minus this, as in PEFT and the paper's code; B begins at zero."""
    return in_size**-0.5


# One for the process: a backward pass, which computes layers again, may be in another thread.
_rows: list[torch.Tensor | None] = [None]


@contextlib.contextmanager
def dropout_rows(keys: torch.Tensor | None) -> Iterator[None]:
    """Within it the rows of the inputs of adapters have these keys, int64 [N]; None: nothing is dropped."""
    before, _rows[0] = _rows[0], keys
    try:
        yield
    finally:
        _rows[0] = before


def current_rows() -> torch.Tensor | None:
    """The keys of the rows that pass through the network now, for a function that is called a second time."""
    return _rows[0]


def name_key(name: str) -> int:
    """A number in int64 that depends on a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def keeps(rows_N: torch.Tensor, channels_D: torch.Tensor, share: float) -> torch.Tensor:
    """Which inputs are kept, bool [N, D].

    Args:
        rows_N: int64, keys of the rows.
        channels_D: int64, keys of the channels, of a linear.
        share: how many are dropped, in [0, 1).
    """
    return (mixed(rows_N[:, None] ^ channels_D) & (_RESOLUTION - 1)) >= round(share * _RESOLUTION)


def mixed(keys: torch.Tensor) -> torch.Tensor:
    """Every bit of the result depends on all bits of the key; int64 of the same shape."""
    for factor in _FACTORS:
        keys = (keys ^ ((keys >> _SHIFT) & _LOW_BITS)) * factor
    return keys ^ ((keys >> _SHIFT) & _LOW_BITS)


class _DroppedLinear(torch.autograd.Function):
    """x -> dropout(x) A^T; of the input itself it keeps a reference, and of what is dropped nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        input_ND: torch.Tensor,
        a_RD: torch.Tensor,
        rows_N: torch.Tensor,
        channels_D: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(input_ND, a_RD, rows_N, channels_D)
        ctx.share = share
        return _dropped(input_ND, rows_N, channels_D, share) @ a_RD.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_ND, a_RD, rows_N, channels_D = ctx.saved_tensors
        gradient_NR = gradients[0]
        gradient_RD = gradient_NR.t() @ _dropped(input_ND, rows_N, channels_D, ctx.share)
        gradient_ND = None
        if ctx.needs_input_grad[0]:
            gradient_ND = _dropped(gradient_NR @ a_RD, rows_N, channels_D, ctx.share)
        return gradient_ND, gradient_RD, None, None, None


def _dropped(tensor_ND: torch.Tensor, rows_N: torch.Tensor, channels_D: torch.Tensor, share: float) -> torch.Tensor:
    """What is kept, over its share, so that the mean stays."""
    return torch.where(keeps(rows_N, channels_D, share), tensor_ND / (1 - share), 0.0)


def dropped_linear(
    input_ND: torch.Tensor, a_RD: torch.Tensor, rows_N: torch.Tensor, channels_D: torch.Tensor, share: float
) -> torch.Tensor:
    """dropout(x) A^T, [N, R]; rows, channels and share as for `keeps`."""
    result: torch.Tensor = _DroppedLinear.apply(input_ND, a_RD, rows_N, channels_D, share)
    return result
