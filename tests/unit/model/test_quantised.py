"""Codes of frozen weights against bitsandbytes, where it is installed, and against searches written out here."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.config.lora_schema import BLOCK_SIZE
from bitdance_scale.model.quantised import NF4_LEVELS, can_quantise, from_integers, from_nf4, quantise

LEVELS = torch.tensor(NF4_LEVELS)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[40, 192], with a block of zeros and one with an outlier."""
    matrix = torch.randn(40, 192, generator=torch.Generator().manual_seed(1)) * 0.02
    matrix[3, :64] = 0
    matrix[5, 70] = 3.0
    return matrix.to(dtype)


def restored(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    codes, scales = quantise(matrix, bits)
    if bits == 8:
        return from_integers(codes, scales, is_compiled=False).view_as(matrix)
    return from_nf4(codes, scales, LEVELS, is_compiled=False).view_as(matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_is_the_nearest_level(dtype):
    matrix = weight(dtype)
    blocks = matrix.view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    units = blocks.float() / scales.float().clamp(min=1e-30)[:, None]
    nearest = (units[..., None] - LEVELS).abs().argmin(-1)
    expected = (LEVELS[nearest] * scales.float()[:, None]).to(dtype).view_as(matrix)
    assert torch.equal(restored(matrix, 4), expected)
    codes, found_scales = quantise(matrix, 4)
    assert codes.shape == (120, 32) and codes.dtype == torch.uint8
    assert found_scales.dtype == dtype and torch.equal(found_scales, scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_are_half_a_step_away_at_most(dtype):
    matrix = weight(dtype)
    codes, scales = quantise(matrix, 8)
    assert codes.shape == (120, 64) and codes.dtype == torch.int8
    assert codes.abs().amax(1).eq(127).sum() == 119, "the largest of every block but that of zeros"
    error = (codes * (scales.double() / 127)[:, None] - matrix.double().view(-1, BLOCK_SIZE)).abs()
    # Of the rounding of a float32 quotient.
    assert (error <= scales.double()[:, None] / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_slice_has_the_codes_of_the_whole(bits):
    matrix = weight()
    whole = restored(matrix, bits)
    assert torch.equal(restored(matrix[10:20], bits), whole[10:20])
    assert torch.equal(restored(matrix[:, 64:128], bits), whole[:, 64:128])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantised_stays_when_it_is_quantised_again(bits):
    # In float32, where the product of level and scale is rounded so little that it stays the nearest.
    once = restored(weight(torch.float32), bits)
    assert torch.allclose(restored(once, bits), once, rtol=1e-6, atol=0)


def test_which_weights_have_whole_blocks():
    assert can_quantise((5, 128))
    assert not can_quantise((128, 96))
    assert not can_quantise((128,))


def test_bitsandbytes_has_the_same_numbers():
    functional = pytest.importorskip("bitsandbytes.functional")
    # Its kernel for processors lets the scale round otherwise in bfloat16.
    matrix = weight(torch.float32)
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, scales = quantise(matrix, 4)
    assert torch.equal(packed.flatten(), codes.flatten())
    assert torch.equal(state.absmax, scales)
    assert torch.equal(functional.dequantize_4bit(packed, state), restored(matrix, 4))
    # Its integers have a scale per row: here a row is a block.
    rows = matrix[torch.arange(40) != 3].view(-1, BLOCK_SIZE)
    integers, stats, _ = functional.int8_vectorwise_quant(rows)
    found, scales = quantise(rows, 8)
    assert torch.equal(integers, found)
    assert torch.equal(stats, scales)
