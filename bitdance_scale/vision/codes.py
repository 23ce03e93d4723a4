"""How the values of a vision token are stored and sent: a row of bytes, by `vision.latents`.

Bits are packed eight to the byte (`bits.py`). Continuous latents are their float32 values, little-endian, four bytes
each. Everything between the tokenizer and the network handles rows of bytes and need not know which they are. A byte of
zeros is a legal code of both: -1 in all bits, or 0 in all latents.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import torch

from bitdance_scale.vision.bits import Array, pack_bits, unpack_bits

_FLOAT_BYTES = 4
# Of latents, which have a standard deviation of about 1: kernels of another batch size round differently.
_LATENT_ROUNDING = 1e-3


def code_bytes(num_values: int, latents: str) -> int:
    """Bytes of the code of a token.

    Args:
        num_values: C, `vision.num_bits`.
        latents: `vision.latents`: bits or continuous.
    """
    return num_values // 8 if latents == "bits" else num_values * _FLOAT_BYTES


def pack_codes(values: Array, latents: str) -> Array:
    """Packs the last axis into bytes.

    Args:
        values: [..., C]; bits: any real dtype, above 0 is +1 and all else -1; continuous: floating point, stored as
            float32.
        latents: `vision.latents`.

    Returns:
        uint8 [..., `code_bytes`].

    Raises:
        ValueError: bits do not fill whole bytes.
    """
    if latents == "bits":
        return pack_bits(values)
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
    return values.to(torch.float32).contiguous().view(torch.uint8)


@overload
def unpack_codes(codes: np.ndarray, latents: str) -> np.ndarray: ...
@overload
def unpack_codes(codes: torch.Tensor, latents: str) -> torch.Tensor: ...
def unpack_codes(codes: np.ndarray | torch.Tensor, latents: str) -> np.ndarray | torch.Tensor:
    """The values of codes, uint8 [..., `code_bytes`]: float32 [..., C]."""
    if latents == "bits":
        return unpack_bits(codes)
    if isinstance(codes, np.ndarray):
        # A copy, because bytes of a file may lie at any address.
        return np.ascontiguousarray(codes).view("<f4").astype(np.float32)
    return codes.contiguous().view(torch.float32)


def agree(one: bytes, other: bytes, latents: str) -> bool:
    """Whether two codes are of one image: equal bits, or latents that differ by rounding."""
    if latents == "bits" or len(one) != len(other):
        return one == other
    first, second = (np.frombuffer(code, "<f4") for code in (one, other))
    return np.allclose(first, second, rtol=_LATENT_ROUNDING, atol=_LATENT_ROUNDING)
