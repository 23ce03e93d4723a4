"""Refusals of the sampler, and its sign."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate import sampler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "heun", "num_steps": 5}, "sample.sampler = 'heun'.*euler_maruyama, euler"),
        ({"num_steps": 0}, "sample.num_steps = 0: must be at least 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        sampler.sample_block(lambda x, t: x, lambda number: torch.zeros(1, 4, 8), **settings)


def test_zero_becomes_minus_one():
    # As the tokenizer's quantiser does: +1 where > 0, else -1.
    bits = sampler.sample_block(lambda x, t: x, lambda number: torch.zeros(1, 4, 8), num_steps=1, sampler="euler")
    assert torch.equal(bits, torch.full((1, 4, 8), -1.0))
