"""Results that are computed again: the same gradients, nothing kept, and the recipe followed once."""

from __future__ import annotations

import shutil
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitdance_scale.parallel.recomputing import not_kept


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_are_those_of_what_was_kept_and_nothing_is_kept():
    hidden, linear = random(5, 8).requires_grad_(), nn.Linear(8, 3)
    expected = torch.autograd.grad(linear(hidden.sigmoid()).square().sum(), [hidden, linear.weight])
    num_calls = 0
    kept = hidden.detach()

    def again() -> list[torch.Tensor]:
        nonlocal num_calls
        num_calls += 1
        return [kept.sigmoid()]

    # Sigmoid keeps its result itself; times one, it is a tensor that only the linear would keep.
    result = hidden.sigmoid() * 1
    with not_kept([result], again, linear):
        output = linear(result)
    is_alive = weakref.ref(result)
    del result
    assert is_alive() is None
    found = torch.autograd.grad(output.square().sum(), [hidden, linear.weight])
    assert num_calls == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_several_results_and_their_views_are_computed_together_and_for_every_backward_pass():
    first, second = random(6, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    expected = torch.autograd.grad((first.exp().T @ second.exp()).sum(), [first, second])
    num_calls = 0
    kept = first.detach(), second.detach()

    def again() -> list[torch.Tensor]:
        nonlocal num_calls
        num_calls += 1
        return [tensor.exp() for tensor in kept]

    results = [first.exp() * 1, second.exp() * 1]
    with not_kept(results, again, nn.Identity()):
        product = (results[0].T @ results[1]).sum()
    for number in (1, 2):
        found = torch.autograd.grad(product, [first, second], retain_graph=True)
        assert num_calls == number
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_of_a_parameter_the_values_at_the_backward_pass_are_read():
    # ZeRO-3 takes a gathered weight away after the forward pass and gathers it again, in other memory.
    linear, hidden = nn.Linear(4, 2, bias=False), random(3, 4).requires_grad_()
    weight = linear.weight.detach().clone()
    # In a buffer with others.
    linear.weight.data = torch.cat([torch.zeros(3), weight.flatten()])[3:].view(2, 4)
    with not_kept([], list, linear):
        output = linear(hidden)
    gathered = weakref.ref(linear.weight.untyped_storage())
    linear.weight.data = torch.empty(0)
    assert gathered() is None, "the gathered weight is held"
    linear.weight.data = torch.cat([weight.flatten(), torch.zeros(5)])[:8].view(2, 4)
    (found,) = torch.autograd.grad(output.sum(), [hidden])
    torch.testing.assert_close(found, weight.sum(0).expand(3, 4))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile")
def test_a_compiled_operation_has_them_computed_again_too():
    # As FlexAttention on CUDA: compiled as a whole, with a backward pass of its own.
    mix = torch.compile(lambda query, key: functional.softmax(query @ key.transpose(0, 1), dim=-1) @ key)
    query, key = random(8, 16).requires_grad_(), random(8, 16, seed=1).requires_grad_()
    expected = torch.autograd.grad(mix(query * 2, key * 2).square().sum(), [query, key])
    num_calls = 0
    kept = query.detach(), key.detach()

    def again() -> list[torch.Tensor]:
        nonlocal num_calls
        num_calls += 1
        return [tensor * 2 for tensor in kept]

    results = [query * 2, key * 2]
    with not_kept(results, again, nn.Identity()):
        mixed = mix(*results)
    alive = [weakref.ref(result) for result in results]
    del results
    assert [one() for one in alive] == [None, None]
    found = torch.autograd.grad(mixed.square().sum(), [query, key])
    assert num_calls == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
