"""The prepared head equals the head asked step by step, in whatever groups its modulations are computed."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.config.schema import HeadSection
from bitdance_scale.generate.head_steps import HeadSteps
from bitdance_scale.generate.sampler import FlowSolver
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears

SECTION = HeadSection(width=24, num_blocks=4, num_adaln=2, head_dim=8)
NUM_BLOCKS, BLOCK_TOKENS, NUM_BITS, COND_SIZE = 3, 4, 6, 20
# float32: 14 modulations a channel.
STEP_BYTES = 14 * 24 * NUM_BLOCKS * BLOCK_TOKENS * 4


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(SECTION, COND_SIZE, NUM_BITS, BLOCK_TOKENS, PlainLinears())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return head.requires_grad_(False)


@pytest.mark.parametrize("sampler", ["euler_maruyama", "euler"])
@pytest.mark.parametrize("max_bytes", [1, 3 * STEP_BYTES, 1 << 30])
def test_prepared_modulations_equal_the_direct_forward(head, sampler, max_bytes):
    solver = FlowSolver(7, sampler=sampler)
    noisy = torch.randn(len(solver.times), NUM_BLOCKS, BLOCK_TOKENS, NUM_BITS)
    condition = torch.randn(NUM_BLOCKS, BLOCK_TOKENS, COND_SIZE)
    predict = HeadSteps(head, solver, torch.device("cpu"), max_bytes).bind(condition)
    for step, time in enumerate(solver.times):
        expected = head(noisy[step], torch.full((NUM_BLOCKS,), time), condition)
        # float32 sums of at most 72 terms in products of other shapes.
        torch.testing.assert_close(predict(noisy[step], step), expected, rtol=1e-5, atol=1e-5)


def test_groups_stay_under_the_bound_and_are_even(head):
    solver, embedded = FlowSolver(7), torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, 24)

    def size(max_bytes: int) -> int:
        return HeadSteps(head, solver, torch.device("cpu"), max_bytes).steps_per_group(embedded)

    # Eight times: within 3 they go in groups of 3, 3 and 2, within 5 in two groups of 4.
    assert [size(STEP_BYTES * steps) for steps in (1, 3, 5, 100)] == [1, 3, 4, 8]
    assert size(1) == 1


def test_a_prepared_group_has_the_size_that_is_bounded(head):
    embedded = torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, 24)
    parts = head.modulations(torch.zeros(5, 24), embedded)
    assert sum(part.numel() * part.element_size() for part in parts) == 5 * STEP_BYTES


def test_blocks_of_another_size_are_refused(head):
    predict = HeadSteps(head, FlowSolver(2), torch.device("cpu")).bind(torch.randn(2, BLOCK_TOKENS, COND_SIZE))
    with pytest.raises(ValueError, match="built for 4"):
        predict(torch.randn(2, 9, NUM_BITS), 0)
