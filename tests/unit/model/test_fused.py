"""Fused operations against the same mathematics operator by operator, with PyTorch's own derivatives.

Uncompiled they are equal bit for bit, but where a comment says why not.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bitdance_scale.model import fused_autograd as operations
from bitdance_scale.model.formula import FORMULAS
from bitdance_scale.model.positions import rotary_table
from bitdance_scale.parallel.vocab_loss import cross_entropy
from tests.formula_shapes import argument_dtype, example_shapes

EPS = 1e-6
# bfloat16 has 8 bits: compiled, intermediate values are not rounded to it. A few roundings of sums of 37 terms.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 1e-1)}
NUM_POSITIONS, WIDTH, NUM_GROUPS, GROUP_SIZE, HEAD_DIM = 37, 48, 2, 3, 16

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile")
EITHER = pytest.mark.parametrize(
    "is_compiled", [False, pytest.param(True, marks=[NEEDS_COMPILER, pytest.mark.large])], ids=["plain", "compiled"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

Function = Callable[..., tuple[torch.Tensor, ...]]


def compare(found: Function, expected: Function, inputs: Sequence[torch.Tensor], is_exact: bool) -> None:
    """Results and gradients of two functions of the same tensors."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    results = [function(*inputs) for function in (found, expected)]
    generator = torch.Generator().manual_seed(1)
    ends = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in results[1]]
    gradients = [torch.autograd.grad(result, inputs, ends) for result in results]
    rtol, atol = (0.0, 0.0) if is_exact else BOUNDS[inputs[0].dtype]
    for one, other in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert one.shape == other.shape
        # Gradients of weights are sums over positions, so that their size counts.
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * float(other.detach().abs().max()))


def random(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(hidden.dtype)


@EITHER
@DTYPES
def test_norm(dtype, is_compiled):
    inputs = random((NUM_POSITIONS, 1, WIDTH), (WIDTH,), dtype=dtype)
    compare(
        lambda hidden, weight: (operations.rms_norm(hidden, weight, EPS, is_compiled),),
        lambda hidden, weight: (plain_norm(hidden, weight),),
        inputs,
        not is_compiled,
    )


@EITHER
@DTYPES
@pytest.mark.parametrize("adds", [False, True])
def test_norm_of_the_residual_stream(adds, dtype, is_compiled):
    def found(stream, weight, *added):
        return operations.stream_rms_norm(stream, added[0] if added else None, weight, EPS, is_compiled)

    def expected(stream, weight, *added):
        stream = stream + added[0] if added else stream * 1
        return stream, plain_norm(stream, weight)

    shape = (NUM_POSITIONS, 2, WIDTH)
    inputs = random(shape, (WIDTH,), *([shape] if adds else []), dtype=dtype)
    # The three terms of the stream's gradient are added in float32: in bfloat16 without a rounding between them, and in
    # float32 in the order of a whole layer, which here is autograd's only with an addition.
    compare(found, expected, inputs, not is_compiled and adds and dtype is torch.float32)


def plain_heads(stacked, table, weights, is_interleaved):
    """Split as Megatron-core lays it out, normalised, and turned as complex numbers are, in real terms."""
    heads = stacked.view(*stacked.shape[:2], NUM_GROUPS, GROUP_SIZE + 2, HEAD_DIM)
    query = heads[..., :GROUP_SIZE, :].flatten(2, 3)
    key, value = heads[..., GROUP_SIZE, :], heads[..., GROUP_SIZE + 1, :]
    if weights:
        query, key = plain_norm(query, weights[0]), plain_norm(key, weights[1])
    cosine, sine = table[:, :, None].chunk(2, dim=-1)

    def turn(x):
        real, imaginary = (x[..., ::2], x[..., 1::2]) if is_interleaved else x.chunk(2, dim=-1)
        turned = real * cosine - imaginary * sine, imaginary * cosine + real * sine
        return torch.stack(turned, dim=-1).flatten(-2) if is_interleaved else torch.cat(turned, dim=-1)

    return turn(query), turn(key), value


@EITHER
@DTYPES
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_heads_are_split_normalised_and_turned(is_interleaved, has_norms, dtype, is_compiled):
    angles = torch.rand(NUM_POSITIONS, 1, 1, HEAD_DIM // 2) * 6
    angles = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles, angles], -1)
    table = rotary_table(angles, is_interleaved, dtype)
    inputs = random((NUM_POSITIONS, 2, NUM_GROUPS * (GROUP_SIZE + 2) * HEAD_DIM), dtype=dtype)
    inputs += random(*[(HEAD_DIM,)] * (2 if has_norms else 0), dtype=dtype)

    def found(stacked, *weights):
        return operations.turn_heads(
            stacked, table, weights or None, EPS, NUM_GROUPS, is_interleaved, is_compiled=is_compiled
        )

    compare(
        found, lambda stacked, *weights: plain_heads(stacked, table, weights, is_interleaved), inputs, not is_compiled
    )


@EITHER
@DTYPES
def test_swiglu(dtype, is_compiled):
    def expected(stacked):
        return (functional.silu(stacked[..., :WIDTH]) * stacked[..., WIDTH:],)

    (stacked,) = random((NUM_POSITIONS, 1, 2 * WIDTH), dtype=dtype)
    compare(lambda stacked: (operations.swiglu(stacked, is_compiled),), expected, [stacked], not is_compiled)


def plain_modulated_norm(x, affine, scale, shift):
    weight, bias = affine or (None, None)
    return functional.layer_norm(x, (WIDTH,), weight, bias, EPS) * (1 + scale) + shift


@EITHER
@DTYPES
@pytest.mark.parametrize("has_affine", [False, True])
def test_modulated_norm_beside_its_input(has_affine, dtype, is_compiled):
    def found(x, scale, shift, *affine):
        return operations.modulated_norm(x, affine or (None, None), (scale, shift), EPS, is_compiled)

    def expected(x, scale, shift, *affine):
        return x * 1, plain_modulated_norm(x, affine, scale, shift)

    shape = (NUM_POSITIONS, 2, WIDTH)
    inputs = random(shape, shape, shape, *[(WIDTH,)] * (2 if has_affine else 0), dtype=dtype)
    compare(found, expected, inputs, not is_compiled)


@EITHER
@DTYPES
def test_modulated_norm_after_a_gated_addition(dtype, is_compiled):
    def found(x, gate, added, scale, shift, *affine):
        return operations.gated_add_norm(x, gate, added, affine, (scale, shift), EPS, is_compiled)

    def expected(x, gate, added, scale, shift, *affine):
        x = x + gate * added
        return x, plain_modulated_norm(x, affine, scale, shift)

    shape = (NUM_POSITIONS, 2, WIDTH)
    compare(found, expected, random(*[shape] * 5, (WIDTH,), (WIDTH,), dtype=dtype), not is_compiled)


@EITHER
@DTYPES
def test_gated_addition(dtype, is_compiled):
    inputs = random(*[(NUM_POSITIONS, 2, WIDTH)] * 3, dtype=dtype)
    compare(
        lambda *values: (operations.gated_add(*values, is_compiled),),
        lambda x, gate, added: (x + gate * added,),
        inputs,
        not is_compiled,
    )


@EITHER
@DTYPES
def test_cross_entropy_of_a_padded_table(dtype, is_compiled):
    """On one rank; `tests/distributed/test_layouts.py` divides the vocabulary."""
    num_entries = 45
    targets = torch.arange(NUM_POSITIONS) + 8

    def found(logits):
        return (cross_entropy(logits * 1, targets, 0, num_entries, None, is_compiled),)

    def expected(logits):
        return (functional.cross_entropy(logits.float()[:, :num_entries], targets, reduction="none"),)

    # PyTorch's soft-max is another kernel.
    compare(found, expected, random((NUM_POSITIONS, WIDTH), dtype=dtype), False)


def test_a_second_backward_pass_over_overwritten_logits_is_refused():
    (logits,) = random((NUM_POSITIONS, WIDTH), dtype=torch.float32)
    targets = torch.arange(NUM_POSITIONS)
    loss = cross_entropy(logits.requires_grad_() * 1, targets, 0, WIDTH, None, False).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@NEEDS_COMPILER
def test_a_formula_is_compiled_once_for_all_lengths_with_gradient_and_without():
    def run(num_positions: int) -> None:
        inputs = random((num_positions, 40), (40,), dtype=torch.float32)
        compare(
            lambda hidden, weight: (operations.rms_norm(hidden, weight, EPS, True),),
            lambda hidden, weight: (plain_norm(hidden, weight),),
            inputs,
            False,
        )
        with torch.no_grad():
            operations.rms_norm(*inputs, EPS, True)

    run(7)
    before = counters["stats"]["unique_graphs"]
    # 1 is computed uncompiled; 40 is the width, too.
    for num_positions in (1, 2, 40, 13, 64):
        run(num_positions)
    assert counters["stats"]["unique_graphs"] == before


class Log(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.num: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num[str(func)] += 1
        return func(*args, **(kwargs or {}))


def arguments(name: str) -> list[Any]:
    """The example arguments of a formula, in its order."""
    shapes = example_shapes(64)[name]
    values = []
    for argument in shapes:
        value = shapes[argument]
        if isinstance(value, tuple):
            value = torch.empty(value, dtype=argument_dtype(name, argument))
        values.append(value)
    return values


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_without_memory_a_compiled_formula_is_one_operator(name):
    formula = FORMULAS[name]
    shapes = example_shapes(64)[name]
    assert set(shapes) == set(formula.__wrapped__.__annotations__) - {"return"}
    with FakeTensorMode():
        values = dict(zip(shapes, arguments(name), strict=True))
        ordered = [values[argument] for argument in formula.__wrapped__.__annotations__ if argument != "return"]
        expected = formula(*ordered, is_compiled=False)
        with Log() as log:
            found = formula(*ordered, is_compiled=True)
    assert log.num == {f"bitdance.{name}.default": 1}
    if expected is None:
        return
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    assert [(one.shape, one.dtype) for one, _ in pairs] == [(other.shape, other.dtype) for _, other in pairs]


def test_only_inputs_are_kept():
    stream, weight, added = random((NUM_POSITIONS, WIDTH), (WIDTH,), (NUM_POSITIONS, WIDTH), dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, normed = operations.stream_rms_norm(stream.requires_grad_(), added, weight, EPS, False)
    assert {tensor.data_ptr() for tensor in kept} == {total.data_ptr(), weight.data_ptr()}
    assert normed.data_ptr() not in {tensor.data_ptr() for tensor in kept}
