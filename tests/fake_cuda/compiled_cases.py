"""What of the networks is compiled for CUDA, with inputs and what it shall give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch

import bitdance_scale.model.fused
import bitdance_scale.model.quantised  # noqa: F401  (both list their formulas)
from bitdance_scale.model import attention, formula
from bitdance_scale.model.formula import FORMULAS
from tests.fake_cuda.generated_kernels import Compilation
from tests.formula_shapes import argument_dtype, example_shapes

# Positions of a sample that see only what is before them, and positions per block of its image.
_TEXT, _BLOCK = 9, 16
# Channels of the networks, of a rank's SwiGLU and its two halves, and entries of the vocabulary that are divided by 16.
_WIDE = frozenset((5120, 4352, 2 * 4352, 37985))
# One number per position, not in the dtype of activations.
_FLOAT32 = frozenset(("largest", "total", "d_loss"))


class Case(Protocol):
    """Something that is compiled."""

    def run(self, length: int, compilation: Compilation) -> dict[str, torch.Tensor]:
        """Its results and gradients on the fake device, for a number of positions; name -> values."""
        ...

    def expected(self, length: int) -> dict[str, torch.Tensor]:
        """The same, computed on the CPU without a compiler."""
        ...


@dataclass(frozen=True)
class FlexAttention:
    """FlexAttention under the mask of a pack, as `FlexMask.attend` compiles it.

    Attributes:
        num_heads: of queries, on one rank.
        num_kv_heads: of keys and values.
        head_dim: channels of a head.
        dtype: of the heads.
        sample: positions of a sample; a pack has as many as fit.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sample: int

    def run(self, length: int, compilation: Compilation) -> dict[str, torch.Tensor]:
        """`mixed` [S, 1, N, K] and the gradients of queries, keys and values."""
        heads, weights = self._inputs(length)
        memory = compilation.memory
        with compilation.mode, mock.patch.object(attention, "to_device", memory.array_on_device):
            mask = attention.flex_mask(*_pack(length, self.sample), torch.device("cuda:0"))
            leaves = [memory.on_device(head).requires_grad_() for head in heads]
            return _values(self._mixed(mask, leaves, memory.on_device(weights)), compilation)

    def expected(self, length: int) -> dict[str, torch.Tensor]:
        """The same with a dense mask within every sample, in float64."""
        heads, weights = self._inputs(length)
        mask = attention.document_mask(*_pack(length, self.sample), torch.device("cpu"))
        return self._mixed(mask, [head.double().requires_grad_() for head in heads], weights.double())

    def _mixed(
        self, mask: attention.PackMask, leaves: list[torch.Tensor], weights: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        mixed = mask.attend(*leaves)
        gradients = torch.autograd.grad(mixed, leaves, weights)
        return {"mixed": mixed, **dict(zip(("d_query", "d_key", "d_value"), gradients, strict=True))}

    def _inputs(self, length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        *heads, weights = (
            torch.randn(length, 1, size, self.head_dim, generator=generator).to(self.dtype) for size in sizes
        )
        return heads, weights


def _values(tensors: Mapping[str, torch.Tensor], compilation: Compilation) -> dict[str, torch.Tensor]:
    return {name: compilation.memory.value(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FusedFormula:
    """A formula of `model/fused.py` in bfloat16, as the 14B networks call it at 4 tensor-parallel ranks.

    Attributes:
        name: of the formula.
        is_narrow: whether it has a sixteenth of the channels, for the interpreter.
    """

    name: str
    is_narrow: bool = False

    def run(self, length: int, compilation: Compilation) -> dict[str, torch.Tensor]:
        """What it gives or rewrites, by number."""
        arguments = self._arguments(length)
        memory = compilation.memory
        # Formulas have an operator that stands in for what is compiled, for tensors without values.
        with compilation.mode, mock.patch.object(formula, "FakeTensor", ()):
            placed = {
                name: memory.on_device(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            results = self._results(placed, is_compiled=True)
            return _values(results, compilation)

    def expected(self, length: int) -> dict[str, torch.Tensor]:
        """The same, operator by operator in float32."""
        arguments = self._arguments(length)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                arguments[name] = value.float()
        return self._results(arguments, is_compiled=False)

    def _results(self, arguments: dict[str, Any], is_compiled: bool) -> dict[str, torch.Tensor]:
        results = FORMULAS[self.name](*arguments.values(), is_compiled=is_compiled)
        if results is None:
            # It rewrites its first argument.
            results = next(iter(arguments.values()))
        return {
            str(number): result for number, result in enumerate(results if isinstance(results, tuple) else [results])
        }

    def _arguments(self, length: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(length)
        shapes = example_shapes(length)[self.name]
        if self.is_narrow:
            shapes = {name: _narrowed(value) for name, value in shapes.items()}
        arguments = {}
        for name in inspect.signature(FORMULAS[self.name].function).parameters:
            shape = shapes[name]
            if not isinstance(shape, tuple):
                arguments[name] = shape
            elif name == "targets":
                arguments[name] = torch.randint(shapes["num_entries"], shape, generator=generator)
            elif name == "codes_RX":
                arguments[name] = torch.randint(127, shape, generator=generator).to(argument_dtype(self.name, name))
            elif name in _FLOAT32 and len(shape) == 1:
                # Those of logits: the largest, and a sum of exponentials.
                arguments[name] = 4 + torch.rand(shape, generator=generator)
            else:
                arguments[name] = torch.randn(shape, generator=generator).to(argument_dtype(self.name, name))
        return arguments


def _narrowed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_narrowed, value))
    return value // 16 if value in _WIDE else value


def _pack(length: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(document_ids, block_ids) of samples of one size, a text and blocks of an image, and padding after the last."""
    positions, padding = np.arange(length), length % sample
    documents, within = positions // sample, positions % sample
    blocks = np.where(within < _TEXT, within, _TEXT + (within - _TEXT) // _BLOCK)
    if padding:
        documents[-padding:], blocks[-padding:] = -1, np.arange(padding)
    return documents.astype(np.int32), blocks.astype(np.int32)


CASES: dict[str, Case] = {
    **{name: FusedFormula(name) for name in FORMULAS},
    **{f"{name}_narrow": FusedFormula(name, is_narrow=True) for name in FORMULAS},
} | {
    f"flex_{name}_{str(dtype).removeprefix('torch.')}": FlexAttention(*heads, dtype, sample)
    for name, (heads, sample) in {
        "14b": ((10, 2, 128), 4224),
        "0p6b": ((16, 8, 128), 1100),
        "imagenet_h": ((20, 20, 64), 260),
        "small": ((2, 1, 32), 150),
    }.items()
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
