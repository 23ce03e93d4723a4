"""The sampler against its equations written out step by step."""

from __future__ import annotations

import math

import pytest
import torch

from bitdance_scale.generate.sampler import FlowSolver, sample_block, solve_flow

SHAPE = (3, 4, 8)


def stand_in_for_head(seed: int):
    """A stand-in for the head: smooth in state and time, different per image and per condition."""
    numbers = torch.Generator().manual_seed(seed)
    mixing = torch.randn(SHAPE[2], SHAPE[2], generator=numbers) / SHAPE[2] ** 0.5
    offsets = torch.randn(2 * SHAPE[0], 1, SHAPE[2], generator=numbers)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ mixing + offsets[: len(x)] + t[:, None, None])

    return predict


def at_times(predict, solver: FlowSolver):
    """The stand-in, called with the number of the step."""
    return lambda x, step: predict(x, torch.full((len(x),), solver.times[step]))


def loop_velocity(predict, x, t, guidance):
    if guidance == 1.0:
        clean = [predict(x, torch.full((len(x),), t))]
    else:
        clean = predict(torch.cat([x, x]), torch.full((2 * len(x),), t)).split(len(x))
    velocities = [(part - x) / max(1 - t, 0.05) for part in clean]
    if guidance == 1.0:
        return velocities[0]
    conditional, unconditional = velocities
    return unconditional + guidance * (conditional - unconditional)


def shifted(ends: torch.Tensor, shift: float) -> list[float]:
    """Ends of the steps: a shift moves the log-odds of a time by the logarithm of the shift."""
    return torch.sigmoid(torch.logit(ends) - math.log(shift)).tolist()


def sample_by_loop(predict, draws, num_steps, guidance, kind, shift=1.0):
    """The final state before its sign, computed step by step."""
    x = draws[0]
    end = 1.0 if kind == "euler" else 0.95
    ends = shifted(torch.linspace(0, end, num_steps + 1, dtype=torch.float64), shift)
    for step in range(num_steps):
        t, dt = ends[step], ends[step + 1] - ends[step]
        if kind == "euler":
            x = x + loop_velocity(predict, x, t, guidance) * dt
            continue
        v = loop_velocity(predict, x, t, guidance)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + (1 - t) * score) * dt + math.sqrt(2 * (1 - t) * dt) * draws[step + 1]
    return x if kind == "euler" else x + loop_velocity(predict, x, 0.95, guidance) * 0.05


@pytest.mark.parametrize("kind", ["euler_maruyama", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 7, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_sampler_against_loop(kind, guidance, num_steps, shift):
    predict = stand_in_for_head(3)
    numbers = torch.Generator().manual_seed(4)
    draws = [torch.randn(SHAPE, generator=numbers) for _ in range(num_steps + 1)]
    evaluated = []

    def observed(x: torch.Tensor, step: int) -> torch.Tensor:
        evaluated.append((len(x), step))
        return at_times(predict, solver)(x, step)

    expected = sample_by_loop(predict, draws, num_steps, guidance, kind, shift)
    solver = FlowSolver(num_steps, guidance, kind, shift)
    assert solver.num_draws == (1 if kind == "euler" else num_steps + 1)
    noise = torch.stack(draws[: solver.num_draws])
    found = solve_flow(observed, noise, solver)
    # Up to 31 steps, each rounding a float32 state of order 1 to 10; a time differs by 1e-7 at most.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    batch = SHAPE[0] if guidance == 1.0 else 2 * SHAPE[0]
    assert evaluated == [(batch, step) for step in range(num_steps + (kind == "euler_maruyama"))]
    bits = sample_block(at_times(predict, solver), noise, solver)
    assert torch.equal(bits, torch.where(found > 0, 1.0, -1.0))


@pytest.mark.parametrize("kind", ["euler_maruyama", "euler"])
def test_a_head_that_knows_the_bits_reaches_them(kind):
    numbers = torch.Generator().manual_seed(5)
    bits = torch.where(torch.randn(SHAPE, generator=numbers) > 0, 1.0, -1.0)
    solver = FlowSolver(20, sampler=kind)
    noise = torch.randn(solver.num_draws, *SHAPE, generator=numbers)
    assert torch.equal(sample_block(lambda x, step: bits, noise, solver), bits)


def test_stochastic_steps_keep_the_distribution_of_the_flow():
    """With data N(0, 1) the flow at time t is N(0, t^2 + (1 - t)^2), and the ideal head is linear."""
    numbers = torch.Generator().manual_seed(6)
    solver = FlowSolver(200)

    def ideal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None]
        return x * t / (t**2 + (1 - t) ** 2)

    noise = torch.randn(solver.num_draws, 500, 4, 32, generator=numbers)
    final = solve_flow(at_times(ideal, solver), noise, solver)
    # 64000 draws give a variance to within 0.6 %; 200 steps leave a discretisation error of about 1 %. A wrong factor
    # in drift or noise moves it by 10 % or more.
    assert final.var().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_without_a_shift_the_steps_are_exactly_uniform(num_steps):
    # Equal bit for bit: what was drawn before there was a shift is drawn again.
    dt = 0.95 / num_steps
    solver = FlowSolver(num_steps)
    assert solver.times == (*(step * dt for step in range(num_steps)), 0.95)
    for step, t in enumerate(solver.times[:-1]):
        pull = (1 + t) * dt / (1 - t)
        assert solver.weights(step) == (1 - dt - pull, pull, (2 * (1 - t) * dt) ** 0.5)
    solver = FlowSolver(num_steps, sampler="euler")
    assert solver.times == tuple(step / num_steps for step in range(num_steps))
    for step, t in enumerate(solver.times):
        share = 1 / (num_steps * max(1 - t, 0.05))
        assert solver.weights(step) == (1 - share, share, 0.0)
