"""Signs of latent values and their storage, eight bits to the byte.

Bit c of a token stands in byte c // 8, most significant bit first (the order of `numpy.packbits`), 1 for +1 and 0 for
-1. Four bytes hold a token of the published 32-bit tokenizer. Every function takes numpy arrays and torch tensors
alike and answers in kind.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def sign_bits(latents: Array) -> Array:
    """Quantises each value to +1 where it is above 0 and to -1 elsewhere (arXiv 2602.14041 Eq. 1; release at 0).

    Args:
        latents: floating point, any shape.

    Returns:
        -1 or +1 in the same shape and dtype; 0 and NaN become -1.
    """
    if isinstance(latents, torch.Tensor):
        return torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
    return np.where(latents > 0, 1.0, -1.0).astype(latents.dtype)


def pack_bits(bits: Array) -> Array:
    """Packs the last axis, eight bits to the byte; `unpack_bits` gives the signs back exactly.

    Args:
        bits: [..., C], any real dtype; values above 0 are +1, all others -1.

    Returns:
        uint8 [..., C / 8].

    Raises:
        ValueError: C is not divisible by 8.
    """
    num_bits = bits.shape[-1]
    if num_bits % 8:
        raise ValueError(f"{num_bits} bits per token do not fill whole bytes: the number must be divisible by 8")
    if isinstance(bits, np.ndarray):
        return np.packbits(bits > 0, axis=-1)
    octets = (bits > 0).to(torch.uint8).unflatten(-1, (num_bits // 8, 8))
    return (octets << _shifts(bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Array, dtype: np.dtype | torch.dtype | None = None) -> Array:
    """Unpacks the last axis into signs.

    Args:
        packed: uint8 [..., C / 8].
        dtype: dtype of the result, of numpy or torch as `packed` is; float32 when None.

    Returns:
        -1 or +1, [..., C].
    """
    if isinstance(packed, np.ndarray):
        signs = np.unpackbits(packed, axis=-1).astype(np.int8) * 2 - 1
        return signs.astype(dtype or np.float32)
    ones = (packed.unsqueeze(-1) >> _shifts(packed.device)) & 1
    return (ones.to(torch.int8) * 2 - 1).flatten(-2).to(dtype or torch.float32)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
