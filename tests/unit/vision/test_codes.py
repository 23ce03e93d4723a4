"""Codes of tokens as bytes: exact both ways, alike in numpy and torch, and compared by what they mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.vision.codes import agree, code_bytes, pack_codes, unpack_codes


def values_of(latents: str, num_values: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((3, 5, num_values), dtype=np.float32)
    return np.where(values > 0, np.float32(1), np.float32(-1)) if latents == "bits" else values


@pytest.mark.parametrize(("latents", "num_values", "num_bytes"), [("bits", 16, 2), ("continuous", 3, 12)])
def test_values_come_back_exactly(latents, num_values, num_bytes):
    values = values_of(latents, num_values)
    assert code_bytes(num_values, latents) == num_bytes
    # Neither contiguous in memory nor, from the file, at an address that floats may have.
    codes = pack_codes(np.asfortranarray(values), latents)
    assert codes.dtype == np.uint8 and codes.shape == (3, 5, num_bytes)
    stored = np.ndarray(codes.shape, np.uint8, b"?" + codes.tobytes(), offset=1)
    found = unpack_codes(stored, latents)
    assert found.dtype == np.float32 and np.array_equal(found, values)
    tensor = pack_codes(torch.from_numpy(values).transpose(0, 1), latents)
    assert np.array_equal(tensor.transpose(0, 1).numpy(), codes)
    assert np.array_equal(unpack_codes(tensor.transpose(0, 1), latents).numpy(), values)


def test_zeros_are_a_code_of_either_kind():
    assert unpack_codes(np.zeros((2, 8), np.uint8), "continuous").tolist() == [[0.0, 0.0]] * 2
    assert set(unpack_codes(np.zeros((2, 8), np.uint8), "bits").flatten().tolist()) == {-1.0}


@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-3), ("tf32", 0.05)])
def test_codes_agree_up_to_rounding(precision, near):
    values = values_of("continuous", 8)
    near *= np.sqrt(np.mean(values**2))
    code = values.tobytes()
    assert agree(code, values + 0.9 * near, "continuous", precision)
    assert not agree(code, values + 1.1 * near, "continuous", precision)
    assert not agree(code[:-4], values, "continuous", precision)
    # A bit may be the other one where the latent is that near to 0, and nowhere else.
    for distance, is_same in ((0.9 * near, True), (1.1 * near, False)):
        values[1, 2, 3] = distance
        bits = np.where(values > 0, 1, -1)
        assert agree(pack_codes(bits, "bits").tobytes(), values, "bits", precision)
        bits[1, 2, 3] = -1
        assert agree(pack_codes(bits, "bits").tobytes(), values, "bits", precision) == is_same
    assert not agree(pack_codes(bits, "bits").tobytes()[:-1], values, "bits", precision)
