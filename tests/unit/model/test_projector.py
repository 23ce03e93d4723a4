"""Bit flips and the projector."""

from __future__ import annotations

import math

import torch

from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector, flip_bits


def test_flips_follow_level_and_draw():
    bits = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    level = torch.tensor([[0.5, 0.5, 0.0, 1.0]])
    draw = torch.tensor([[0.04, 0.05, 0.0, 0.0999]])
    # Probabilities 0.05, 0.05, 0, 0.1 with flip_max 0.1; a draw equal to the probability does not flip.
    assert flip_bits(bits, level, draw, 0.1).tolist() == [[-1.0, -1.0, 1.0, 1.0]]
    assert torch.equal(flip_bits(bits, level, draw, 0.0), bits)


def test_share_of_flips():
    numbers = torch.Generator().manual_seed(0)
    bits = torch.ones(2000, 32)
    level, draw = torch.rand(2, 2000, 32, generator=numbers)
    flipped = flip_bits(bits, level, draw, 0.1) < 0
    # Mean probability 0.05 over 64000 elements: standard error sqrt(0.05 * 0.95 / 64000) = 8.6e-4, 4 of them.
    assert abs(flipped.float().mean().item() - 0.05) < 3.5e-3
    # The level is per element: where u > 0.5 the mean probability is 0.075 (standard error 1.5e-3).
    assert abs(flipped[level > 0.5].float().mean().item() - 0.075) < 6e-3


def test_projector_against_its_formula():
    torch.manual_seed(0)
    projector = Projector(8, 12, PlainLinears())
    bits = torch.where(torch.randn(5, 8) > 0, 1, -1).to(torch.int8)
    weights = projector.state_dict()
    assert sorted(weights) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
    hidden = bits.float() @ weights["fc1.weight"].T + weights["fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    # float32 sums of at most 12 terms. The exact GELU differs by up to 5e-4.
    expected = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    torch.testing.assert_close(projector(bits), expected, rtol=0, atol=1e-6)
