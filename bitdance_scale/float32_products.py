"""How CUDA multiplies float32: exactly, or in TF32, which drops 13 of the 23 bits of the factors' mantissas.

PyTorch's own default is TF32 in convolutions and not in products of matrices. Here it is always said which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch

PRECISIONS = {"float32": "ieee", "tf32": "tf32"}
"""What a configuration says -> what PyTorch calls it."""


def set_float32_products(precision: str) -> None:
    """Sets the precision of convolutions and products of matrices in float32 on CUDA, for this process.

    Args:
        precision: float32 or tf32.
    """
    _set(PRECISIONS[precision], PRECISIONS[precision])


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """`set_float32_products` within the block."""
    before = _convolutions().fp32_precision, torch.backends.cuda.matmul.fp32_precision
    set_float32_products(precision)
    try:
        yield
    finally:
        _set(*before)


def _set(convolutions: str, products: str) -> None:
    _convolutions().fp32_precision = convolutions
    torch.backends.cuda.matmul.fp32_precision = products


def _convolutions() -> Any:
    # Without a type: PyTorch puts the attribute there when it is imported.
    return cast(Any, torch.backends.cudnn).conv
