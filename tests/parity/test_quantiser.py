"""The entropy loss against a plain enumeration of the codebook, and its gradient across ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bitdance_scale.vision.quantiser import code_usage, entropy_loss, straight_through_sign


def enumerated(latents: torch.Tensor, num_groups: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 of arXiv 2602.14041 taken literally: distances to every code, softmax and entropies, group by group."""
    size = latents.shape[1] // num_groups
    codebook = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=latents.dtype)
    token, codes = [], []
    for group in latents.split(size, dim=1):
        distances = (group[:, None, :] - codebook[None]).square().sum(dim=-1)
        probabilities = torch.softmax(-distances / temperature, dim=-1)
        token.append(-(probabilities * probabilities.log()).sum(dim=-1).mean())
        mean = probabilities.mean(dim=0)
        codes.append(-(mean * mean.log()).sum())
    return torch.stack(token).mean(), torch.stack(codes).mean()


@pytest.mark.parametrize(
    ("num_bits", "num_groups", "temperature"), [(8, 1, 1.0), (8, 2, 0.5), (16, 4, 2.0), (6, 6, 1.0)]
)
def test_terms_and_gradients_equal_the_enumeration(num_bits: int, num_groups: int, temperature: float):
    torch.manual_seed(0)
    latents = (0.4 * torch.randn(50, num_bits)).requires_grad_()
    result = entropy_loss(latents, num_groups, temperature)
    (gradient,) = torch.autograd.grad(result.loss, latents)
    reference = latents.detach().double().requires_grad_()
    token, codebook = enumerated(reference, num_groups, temperature)
    (reference_gradient,) = torch.autograd.grad(token - codebook, reference)
    # float32 against float64; the terms are sums of up to 256 values of order 1.
    torch.testing.assert_close(result.token.double(), token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.codebook.double(), codebook, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), reference_gradient, rtol=1e-4, atol=1e-7)


def test_extremes():
    """Decided tokens spread evenly over all codes reach -K ln 2; undecided or identical ones reach 0."""
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    # exp(-4 * 10) is below float32's resolution of 1.
    torch.testing.assert_close(entropy_loss(10 * codes, 1, 1.0).loss.item(), -4 * math.log(2), rtol=1e-6, atol=0)
    # Both terms are 4 ln 2 (undecided) or 0 (identical) up to rounding of sums of 16 values.
    assert entropy_loss(torch.zeros(16, 4), 1, 1.0).loss.item() == pytest.approx(0, abs=1e-5)
    assert entropy_loss(10 * codes[:1].expand(16, 4), 1, 1.0).loss.item() == pytest.approx(0, abs=1e-5)


def test_large_latents_keep_finite_gradients():
    latents = torch.full((4, 8), 1e4, requires_grad=True)
    loss = entropy_loss(latents, 1, 0.01).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(latents.grad).all()


def test_gradients_of_the_ranks_add_up_to_that_of_the_global_batch():
    torch.manual_seed(0)
    latents = (0.3 * torch.randn(40, 8)).requires_grad_()
    whole = entropy_loss(latents, 2, 1.0)
    (gradient,) = torch.autograd.grad(whole.loss, latents)

    parts = [part.detach().requires_grad_() for part in latents.split([7, 20, 13])]
    seen: list[torch.Tensor] = []
    for part in parts:
        entropy_loss(part, 2, 1.0, 40, lambda mean: seen.append(mean) or mean)
    global_mean = torch.stack(seen).sum(dim=0)
    losses = [entropy_loss(part, 2, 1.0, 40, lambda mean: global_mean) for part in parts]
    gradients = [torch.autograd.grad(loss.loss, part)[0] for loss, part in zip(losses, parts, strict=True)]
    # float32 rounding.
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(sum(loss.token for loss in losses), whole.token, rtol=1e-6, atol=0)
    for loss in losses:
        torch.testing.assert_close(loss.codebook, whole.codebook, rtol=1e-6, atol=0)


def test_sign_passes_the_gradient_straight_through():
    latents = torch.tensor([-0.3, 0.0, 2.0], requires_grad=True)
    bits = straight_through_sign(latents)
    assert bits.tolist() == [-1.0, -1.0, 1.0]
    (bits * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert latents.grad.tolist() == [1.0, 2.0, 3.0]


def test_usage_counts_codes_with_the_first_bit_most_significant():
    bits = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, -1.0, 1.0, 1.0]])
    assert code_usage(bits, 2).tolist() == [[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_groups_must_share_the_bits_and_stay_small(num_groups: int):
    with pytest.raises(ValueError, match=f"32 bits in {num_groups} groups"):
        entropy_loss(torch.zeros(1, 32), num_groups, 1.0)
