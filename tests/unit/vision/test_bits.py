"""Signs and packed bits: lossless, and the same in numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.vision.bits import pack_bits, sign_bits, unpack_bits


def test_only_values_above_zero_become_plus_one():
    latents = np.array([-2.0, -0.0, 0.0, 1e-30, 3.0, np.nan], dtype=np.float32)
    expected = np.array([-1, -1, -1, 1, 1, -1], dtype=np.float32)
    np.testing.assert_array_equal(sign_bits(latents), expected)
    assert sign_bits(latents).dtype == np.float32
    torch.testing.assert_close(sign_bits(torch.from_numpy(latents)), torch.from_numpy(expected), rtol=0, atol=0)
    assert sign_bits(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("num_bits", [8, 16, 32, 256])
def test_packing_loses_nothing_and_numpy_agrees_with_torch(num_bits: int):
    bits = sign_bits(np.random.default_rng(0).normal(size=(3, 5, num_bits)))
    packed = pack_bits(bits)
    assert packed.dtype == np.uint8 and packed.shape == (3, 5, num_bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed), bits)
    np.testing.assert_array_equal(pack_bits(torch.from_numpy(bits)).numpy(), packed)
    unpacked = unpack_bits(torch.from_numpy(packed))
    assert unpacked.dtype == torch.float32
    np.testing.assert_array_equal(unpacked.numpy(), bits)


def test_the_first_bit_is_the_most_significant():
    bits = -np.ones((1, 16), dtype=np.float32)
    bits[0, [0, 15]] = 1
    assert pack_bits(bits).tolist() == [[0x80, 0x01]]
    assert pack_bits(torch.from_numpy(bits)).tolist() == [[0x80, 0x01]]


@pytest.mark.parametrize("bits", [np.ones((2, 12)), torch.ones(2, 12)])
def test_bits_that_do_not_fill_bytes_are_refused(bits: np.ndarray | torch.Tensor):
    with pytest.raises(ValueError, match="12 bits per token.*multiple of 8"):
        pack_bits(bits)
