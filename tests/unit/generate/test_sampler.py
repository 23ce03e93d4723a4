"""Refusals of the solver, and its sign."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.sampler import FlowSolver, sample_block


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "heun", "num_steps": 5}, "sampler = 'heun'.*euler_maruyama, euler"),
        ({"num_steps": 0}, "sampling steps = 0: must be at least 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        FlowSolver(**settings)


def test_zero_becomes_minus_one():
    # As the tokenizer's quantiser does: +1 where > 0, else -1.
    solver = FlowSolver(1, sampler="euler")
    bits = sample_block(lambda x, step: x, torch.zeros(1, 1, 4, 8), solver)
    assert torch.equal(bits, torch.full((1, 4, 8), -1.0))
