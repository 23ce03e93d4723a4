"""Signs of latent values and their storage, eight bits to the byte.

Bit c of a token is in byte c // 8, most significant bit first (the order of `numpy.packbits`); 1 means +1 and 0 means
-1. A token of the published 32-bit tokenizer takes four bytes. Every function takes numpy arrays and torch tensors, and
returns what it is given.
"""

from __future__ import annotations

from typing import TypeVar, overload

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def sign_bits(latents: Array) -> Array:
    """Quantises each value to +1 if it is above 0 and to -1 otherwise (arXiv 2602.14041 Eq. 1; at 0 as in the release).

    Args:
        latents: floating point, any shape.

    Returns:
        -1 or +1, in the same shape and dtype; 0 and NaN become -1.
    """
    if isinstance(latents, torch.Tensor):
        return torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
    return np.where(latents > 0, 1.0, -1.0).astype(latents.dtype)


def pack_bits(bits: Array) -> Array:
    """Packs the last axis, eight bits to the byte; `unpack_bits` restores the signs exactly.

    Args:
        bits: [..., C], any real dtype; values above 0 are +1, all others -1.

    Returns:
        uint8 [..., C / 8].

    Raises:
        ValueError: C is not divisible by 8.
    """
    num_bits = bits.shape[-1]
    if num_bits % 8:
        raise ValueError(f"{num_bits} bits per token do not fill whole bytes; use a multiple of 8")
    if isinstance(bits, np.ndarray):
        return np.packbits(bits > 0, axis=-1)
    octets = (bits > 0).to(torch.uint8).unflatten(-1, (num_bits // 8, 8))
    return (octets << _shifts(bits.device)).sum(dim=-1, dtype=torch.uint8)


@overload
def unpack_bits(packed: np.ndarray) -> np.ndarray: ...
@overload
def unpack_bits(packed: torch.Tensor) -> torch.Tensor: ...
def unpack_bits(packed: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Unpacks the last axis into signs.

    Args:
        packed: uint8 [..., C / 8].

    Returns:
        float32 [..., C], -1 or +1.
    """
    if isinstance(packed, np.ndarray):
        return np.unpackbits(packed, axis=-1).astype(np.float32) * 2 - 1
    ones = (packed.unsqueeze(-1) >> _shifts(packed.device)) & 1
    return (ones.to(torch.int8) * 2 - 1).flatten(-2).to(torch.float32)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
