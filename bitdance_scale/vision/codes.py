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
ROUNDING = {"float32": 1e-3, "tf32": 0.05}
"""How far the latents of an image may lie apart in two batches, over their root mean square, by `vision.precision`.

With the published sizes, random weights and coloured noise rounding moved a latent by at most 4e-5 in float32, and by
0.0125 with all factors of convolutions rounded to TF32, where 0.05 to 0.15 % of the bits flipped.
"""


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


def agree(code: bytes, values: np.ndarray, latents: str, precision: str) -> bool:
    """Whether a code is of the image with these values, up to what kernels of another batch size round differently.

    Args:
        code: of all tokens of an image.
        values: float32 [..., C], its latents, encoded once more: of bits those before the sign.
        latents: `vision.latents`.
        precision: `vision.precision`, which says how far latents may differ (`ROUNDING`). Bits may differ where the
            latent is as near to 0 as that.
    """
    if len(code) != values[..., 0].size * code_bytes(values.shape[-1], latents):
        return False
    found = unpack_codes(np.frombuffer(code, np.uint8).reshape(*values.shape[:-1], -1), latents)
    near = ROUNDING[precision] * np.sqrt(np.mean(np.square(values, dtype=np.float64)))
    difference = (
        np.abs(values) * (found != np.where(values > 0, 1, -1)) if latents == "bits" else np.abs(found - values)
    )
    return bool((difference <= near).all())
