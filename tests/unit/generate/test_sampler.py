"""The solver's refusals and its sign, the head prepared for all steps, and the noise that images are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.config.schema import HeadSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.sampler import (
    FlowSolver,
    GeneratorNoise,
    HeadSteps,
    ImageNoise,
    block_sampler,
    sample_block,
    solve_flow,
)
from bitdance_scale.model.bit_head import BitHead
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.sequence.noise import Purpose, generator
from bitdance_scale.vision.bits import sign_bits

CPU = torch.device("cpu")
SECTION = HeadSection(width=24, num_blocks=4, num_adaln=2, head_dim=8)
NUM_BLOCKS, BLOCK_TOKENS, NUM_BITS, COND_SIZE = 3, 4, 6, 20
# float32: 14 modulations a channel.
STEP_BYTES = 14 * 24 * NUM_BLOCKS * BLOCK_TOKENS * 4
# (K, P, C); P * C is no multiple of 16, where torch fills tensors in another order than part by part.
NOISE_SHAPE = (5, 3, 7)


class TestFlowSolver:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sampler": "heun", "num_steps": 5}, "sampler = 'heun'.*euler_maruyama, euler"),
            ({"num_steps": 0}, "sampling steps = 0: must be at least 1"),
            ({"num_steps": 5, "time_shift": 0.0}, "head.time_shift = 0.0: must be a finite number above 0"),
            ({"num_steps": 5, "time_shift": float("nan")}, "head.time_shift = nan"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            FlowSolver(**settings)

    def test_zero_becomes_minus_one(self):
        # As the tokenizer's quantiser does: +1 where > 0, else -1.
        solver = FlowSolver(1, sampler="euler")
        bits = sample_block(lambda x, step: x, torch.zeros(1, 1, 4, 8), solver)
        assert torch.equal(bits, torch.full((1, 4, 8), -1.0))

    def test_guidance_grows_over_the_image(self):
        assert [FlowSolver(1, guidance=5.0).guidance_at(block, 4) for block in range(4)] == [5.0] * 4
        solver = FlowSolver(1, guidance=5.0, guidance_growth="linear")
        assert [solver.guidance_at(block, 4) for block in range(4)] == [1.0, 2.0, 3.0, 4.0]
        assert [solver.guides(block, 4) for block in range(4)] == [False, True, True, True]
        assert FlowSolver(1, guidance=5.0).guides(0, 4) and not FlowSolver(1, guidance_growth="linear").guides(3, 4)

    def test_a_block_may_have_a_scale_of_its_own(self, head):
        noise = torch.randn(5, 2, BLOCK_TOKENS, NUM_BITS)
        condition = torch.randn(4, BLOCK_TOKENS, COND_SIZE)
        growing = block_sampler(head, FlowSolver(4, guidance=9.0, guidance_growth="linear"), CPU)
        own = block_sampler(head, FlowSolver(4, guidance=3.0), CPU).draw(condition, noise, 3.0)
        assert torch.equal(growing.draw(condition, noise, 3.0), own)
        # With a scale of 1 every block has its own noise and its own condition, those of both halves alike.
        noise = torch.cat([noise, torch.randn_like(noise)], dim=1)
        alone = block_sampler(head, FlowSolver(4, guidance=1.0), CPU).draw(condition, noise, 1.0)
        assert torch.equal(growing.draw(condition, noise, 1.0), alone) and len(alone) == 4

    def test_continuous_latents_are_the_state_itself(self, head):
        noise, condition = torch.randn(5, 2, BLOCK_TOKENS, NUM_BITS), torch.randn(4, BLOCK_TOKENS, COND_SIZE)
        solver = FlowSolver(4, guidance=3.0)
        latents = block_sampler(head, solver, CPU, "continuous").draw(condition, noise, 3.0)
        expected = solve_flow(HeadSteps(head, solver, CPU).bind(condition), noise, solver, 3.0)
        assert torch.equal(latents, expected) and not torch.equal(latents.abs(), torch.ones_like(latents))
        assert torch.equal(block_sampler(head, solver, CPU).draw(condition, noise, 3.0), sign_bits(latents))


class TestBitHead:
    """Independent bits: their odds, their loss and how often each is drawn."""

    def test_loss_and_draws_are_those_of_two_classes_per_bit(self):
        torch.manual_seed(1)
        head = BitHead(COND_SIZE, NUM_BITS, PlainLinears())
        condition = torch.randn(1, BLOCK_TOKENS, COND_SIZE)
        clean = torch.randint(0, 2, (1, BLOCK_TOKENS, NUM_BITS)) * 2.0 - 1
        logits = head.linear(condition).view(BLOCK_TOKENS, 2, NUM_BITS)
        expected = torch.nn.functional.cross_entropy(logits, (clean[0] > 0).long(), reduction="sum") / NUM_BITS
        loss, per_block = head.losses(condition, clean, torch.empty(0), torch.empty(0), reports_blocks=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(per_block, expected[None] / BLOCK_TOKENS)
        sampler, num = block_sampler(head, FlowSolver(3), CPU), 4000
        drawn = sampler.draw(condition.expand(num, -1, -1), torch.randn(1, num, BLOCK_TOKENS, NUM_BITS), 1.0)
        assert set(drawn.unique().tolist()) == {-1.0, 1.0}
        # Five standard errors of a share of 4000 draws.
        share = (drawn > 0).float().mean(0)
        torch.testing.assert_close(share, logits.softmax(dim=1)[:, 1].detach(), rtol=0, atol=0.04)

    def test_guidance_scales_the_odds(self):
        torch.manual_seed(2)
        head = BitHead(COND_SIZE, NUM_BITS, PlainLinears())
        condition = torch.randn(2, BLOCK_TOKENS, COND_SIZE)
        conditional, unconditional = head(condition)
        noise = torch.randn(1, 1, BLOCK_TOKENS, NUM_BITS)
        drawn = block_sampler(head, FlowSolver(3, guidance=4.0), CPU).draw(condition, noise, 4.0)
        odds = unconditional + 4.0 * (conditional - unconditional)
        assert torch.equal(drawn[0] > 0, torch.special.ndtr(noise[0, 0]) < odds.sigmoid())


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(SECTION, COND_SIZE, NUM_BITS, BLOCK_TOKENS, PlainLinears())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return head.requires_grad_(False)


class TestHeadSteps:
    """The prepared head equals the head called step by step, in whatever groups its modulations are computed."""

    @pytest.mark.parametrize("sampler", ["euler_maruyama", "euler"])
    @pytest.mark.parametrize("max_bytes", [1, 3 * STEP_BYTES, 1 << 30])
    def test_prepared_modulations_equal_the_direct_forward(self, head, sampler, max_bytes):
        solver = FlowSolver(7, sampler=sampler)
        noisy = torch.randn(len(solver.times), NUM_BLOCKS, BLOCK_TOKENS, NUM_BITS)
        condition = torch.randn(NUM_BLOCKS, BLOCK_TOKENS, COND_SIZE)
        predict = HeadSteps(head, solver, CPU, max_bytes).bind(condition)
        for step, time in enumerate(solver.times):
            expected = head(noisy[step], torch.full((NUM_BLOCKS,), time), condition)
            # float32 sums of at most 72 terms in products of other shapes.
            torch.testing.assert_close(predict(noisy[step], step), expected, rtol=1e-5, atol=1e-5)

    def test_groups_stay_under_the_bound_and_are_even(self, head):
        solver, embedded = FlowSolver(7), torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, 24)

        def size(max_bytes: int) -> int:
            return HeadSteps(head, solver, CPU, max_bytes).steps_per_group(embedded)

        # Eight times: within 3 they go in groups of 3, 3 and 2, within 5 in two groups of 4.
        assert [size(STEP_BYTES * steps) for steps in (1, 3, 5, 100)] == [1, 3, 4, 8]
        assert size(1) == 1

    def test_a_prepared_group_has_the_size_that_is_bounded(self, head):
        embedded = torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, 24)
        parts = head.modulations(torch.zeros(5, 24), embedded)
        assert sum(part.numel() * part.element_size() for part in parts) == 5 * STEP_BYTES

    def test_blocks_of_another_size_are_refused(self, head):
        predict = HeadSteps(head, FlowSolver(2), CPU).bind(torch.randn(2, BLOCK_TOKENS, COND_SIZE))
        with pytest.raises(ValueError, match="built for 4"):
            predict(torch.randn(2, 9, NUM_BITS), 0)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestNoise:
    def test_one_generator_draws_the_batch_tensor_by_tensor(self):
        source = numbers(3)
        expected = [torch.stack([torch.randn(2, 3, 7, generator=source) for _ in range(5)]) for _ in range(2)]
        noise = GeneratorNoise(numbers(3), 2, NOISE_SHAPE, CPU)
        assert all(torch.equal(noise(), block) for block in expected)

    def test_a_list_gives_each_image_its_own_stream(self):
        together = GeneratorNoise([numbers(1), numbers(2)], 2, NOISE_SHAPE, CPU)
        alone = GeneratorNoise([numbers(2)], 1, NOISE_SHAPE, CPU)
        for _ in range(3):
            assert torch.equal(together()[:, 1:], alone())

    def test_without_a_generator_torch_s_own_is_used(self):
        torch.manual_seed(7)
        first = GeneratorNoise(None, 2, NOISE_SHAPE, CPU)()
        torch.manual_seed(7)
        assert torch.equal(GeneratorNoise(None, 2, NOISE_SHAPE, CPU)(), first)

    def test_training_s_noise_is_drawn_tensor_by_tensor_from_its_stream(self):
        streams = [generator(4, Purpose.SAMPLE_IMAGE, 0, number) for number in (0, 9)]
        noise = ImageNoise(4, [0, 9], NOISE_SHAPE, CPU)
        for _ in range(2):
            rows = [[stream.standard_normal((3, 7), dtype=np.float32) for _ in range(5)] for stream in streams]
            assert torch.equal(noise(), torch.from_numpy(np.stack(rows, axis=1)))
