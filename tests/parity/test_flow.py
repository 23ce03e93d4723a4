"""Flow, losses and sampler against the paper's equations written out element by element."""

from __future__ import annotations

import math

import pytest
import torch

from bitdance_scale.config.schema import HeadSection
from bitdance_scale.model import flow

SHAPE = (3, 4, 8)
# Elementwise float32 arithmetic; the quotient by 1 - t >= 0.05 enlarges rounding of 6e-8 at most 20-fold, the square
# and the reference's float64 double it.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def example(seed: int = 0):
    numbers = torch.Generator().manual_seed(seed)
    bits = torch.where(torch.randn(SHAPE, generator=numbers) > 0, 1.0, -1.0)
    noise = torch.randn(SHAPE, generator=numbers)
    pred = torch.tanh(torch.randn(SHAPE, generator=numbers))
    return bits, noise, pred, torch.tensor([0.0, 0.4, 0.99])


def test_interpolation_and_loss_with_gradient():
    bits, noise, pred, t = example()
    noisy = flow.interpolate(bits, noise, t)
    pred.requires_grad_(True)
    total, count = flow.flow_loss(pred, bits, noisy, t)
    (gradient,) = torch.autograd.grad(total, pred)

    expected, expected_gradient = 0.0, torch.zeros(SHAPE)
    for block in range(SHAPE[0]):
        time = t[block].item()
        remaining = max(1 - time, 0.05)
        for token in range(SHAPE[1]):
            for bit in range(SHAPE[2]):
                at = (block, token, bit)
                state = time * bits[at].item() + (1 - time) * noise[at].item()
                assert noisy[at].item() == pytest.approx(state, abs=1e-6)
                target = (bits[at].item() - state) / remaining
                error = (pred[at].item() - state) / remaining - target
                expected += error**2 / SHAPE[2]
                expected_gradient[at] = 2 * error / remaining / SHAPE[2]
    assert count == SHAPE[0] * SHAPE[1]
    assert total.item() == pytest.approx(expected, rel=1e-5)
    # The gradient carries 1 / (1 - t)^2 = 400 at the last block: rounding of the times of 6e-8 over 0.05, squared.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_velocity_is_data_minus_noise_before_the_bound():
    bits, noise, _, _ = example()
    t = torch.tensor([0.0, 0.5, 0.9])
    torch.testing.assert_close(flow.velocity(bits, flow.interpolate(bits, noise, t), t), bits - noise, **FLOAT32)


def test_logit_normal_time_with_shift():
    section = HeadSection(width=128, time_shift=3.0)
    normals = torch.linspace(-3, 3, 13)
    for normal, t in zip(normals.tolist(), flow.draw_time(normals, section).tolist(), strict=True):
        plain = 1 / (1 + math.exp(-(0.8 * normal - 0.8)))
        assert t == pytest.approx(plain / (plain + 3.0 * (1 - plain)), rel=1e-5)


def test_uniform_time_is_uniform():
    normals = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = flow.draw_time(normals, HeadSection(width=128, time_schedule="uniform")).sort().values
    # Kolmogorov-Smirnov: the largest gap to the diagonal passes 1.95 / sqrt(n) once in 1000 seeds.
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 1.95 / len(t) ** 0.5
