"""Frozen weights in fewer bits: a code per weight and a scale per block of a row.

8 bits are integers from -127 to 127, 4 bits the sixteen levels of NF4 (QLoRA, arXiv 2305.14314, Appendix E). A block is
`BLOCK_SIZE` neighbouring inputs of one output, and its scale the largest magnitude in it. That is one of the weights
themselves, so their dtype holds it exactly, and a second quantisation of scales would save 0.13 bits. A block depends
on no other, so a slice of a matrix has the codes that the whole has there, if it is cut between blocks.

Shape suffixes: R blocks, X bytes of the codes of a block (`BLOCK_SIZE` or half of it), L levels.
"""

from __future__ import annotations

import math

import torch

from bitdance_scale.config.lora_schema import BLOCK_SIZE
from bitdance_scale.model.formula import formula

_LARGEST_CODE = 127
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What a 4-bit code means, in units of the scale: quantiles of a normal distribution, with an exact zero."""
# Blocks at a time: what quantising needs beside its result stays small.
_BLOCKS_AT_ONCE = 1 << 20


@formula()
def from_integers(codes_RX: torch.Tensor, scales_R: torch.Tensor) -> torch.Tensor:
    """Weights [R, X] in the dtype of the scales, of int8 codes; computed in float32, rounded once."""
    torch._check(scales_R.shape[0] == codes_RX.shape[0])
    return (codes_RX.float() * (scales_R.float() / _LARGEST_CODE)[:, None]).to(scales_R.dtype)


@formula(whole=("levels_L",))
def from_nf4(codes_RX: torch.Tensor, scales_R: torch.Tensor, levels_L: torch.Tensor) -> torch.Tensor:
    """Weights [R, 2 X] in the dtype of the scales, of 4-bit codes; computed in float32, rounded once.

    Args:
        codes_RX: uint8; the earlier weight of a byte is in its upper half.
        scales_R: of the blocks.
        levels_L: float32 [16], `NF4_LEVELS`.
    """
    torch._check(scales_R.shape[0] == codes_RX.shape[0])
    codes = torch.stack([codes_RX >> 4, codes_RX & 15], dim=-1).flatten(1)
    return (levels_L[codes.int()] * scales_R.float()[:, None]).to(scales_R.dtype)


def can_quantise(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether the rows of a weight are made of whole blocks."""
    return len(shape) == 2 and shape[1] % BLOCK_SIZE == 0


def quantise(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [R, X], scales [R] in the dtype of the weight) of a weight [out, in], in its memory order.

    Every code is that of the nearest level; between two levels that are equally near, NF4 takes the lower one and the
    integers the even one.

    Args:
        weight: [out, in], `in` a multiple of `BLOCK_SIZE`.
        bits: 8 (codes are int8) or 4 (uint8, two to a byte).
    """
    assert can_quantise(weight.shape), f"the rows of {tuple(weight.shape)} are not made of whole blocks"
    blocks = weight.detach().reshape(-1, BLOCK_SIZE)
    encode = {8: _integers, 4: _nf4}[bits]
    parts = [encode(part, part.abs().amax(1)) for part in blocks.split(_BLOCKS_AT_ONCE)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def empty_codes(
    shape: tuple[int, ...], bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what `quantise` returns of a weight of this shape and dtype."""
    assert can_quantise(shape), f"the rows of {tuple(shape)} are not made of whole blocks"
    num_blocks = math.prod(shape) // BLOCK_SIZE
    code_dtype = {8: torch.int8, 4: torch.uint8}[bits]
    codes = torch.empty(num_blocks, BLOCK_SIZE * bits // 8, dtype=code_dtype, device=device)
    return codes, torch.empty(num_blocks, dtype=dtype, device=device)


def _integers(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factors = _LARGEST_CODE / scales.float().where(scales > 0, 1)
    return torch.round(blocks.float() * factors[:, None]).to(torch.int8), scales


def _nf4(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    levels = torch.tensor(NF4_LEVELS, device=blocks.device)
    units = blocks.float() / scales.float().where(scales > 0, 1)[:, None]
    codes = torch.bucketize(units, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales
