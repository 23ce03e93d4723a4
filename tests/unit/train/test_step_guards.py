"""The rules on the numbers of a step, without a model."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from bitdance_scale.config.schema import OptimSection
from bitdance_scale.errors import TrainingError
from bitdance_scale.train.step_guards import Spike, StepGuards, spike_limit

SECTION = OptimSection(
    max_skipped_steps=3, max_skipped_share=0.2, skipped_window=20, spike_deviations=10.0, spike_window=8
)


def fed(section: OptimSection = SECTION, losses: tuple[float, ...] = (), norm: float = 1.0) -> StepGuards:
    guards = StepGuards(section)
    for loss in losses:
        guards.judge(loss, norm)
    return guards


def test_every_second_step_not_finite_stops_the_run() -> None:
    guards = StepGuards(SECTION)
    with pytest.raises(
        TrainingError,
        match=r"step 9: 5 of the last 9 steps .*optim\.max_skipped_share = 0\.2 of optim\.skipped_window = 20",
    ):
        for step in range(1, 100):
            guards.count(step, is_skipped=step % 2 == 1)


def test_steps_skipped_in_a_row_stop_the_run_as_before() -> None:
    guards = StepGuards(dataclasses.replace(SECTION, max_skipped_share=1.0))
    for step in range(1, 4):
        guards.count(step, is_skipped=True)
    with pytest.raises(TrainingError, match=r"step 4: 4 consecutive steps .* \(optim\.max_skipped_steps = 3\)"):
        guards.count(4, is_skipped=True)


def test_a_share_within_the_limit_goes_on_for_ever() -> None:
    guards = StepGuards(SECTION)
    for step in range(1, 1000):
        guards.count(step, is_skipped=step % 5 == 0)


def test_a_single_spike_is_found_and_says_what_it_is() -> None:
    guards = fed(losses=(1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0))
    spike = guards.judge(100.0, 1.0)
    assert spike is not None and spike.quantity == "loss" and spike.median == 1.0
    # MAD of the eight is 0.025; 5 % of the median is more than 1.4826 times it.
    assert spike.limit == pytest.approx(1.0 + 10 * 0.05)
    assert guards.num_spikes == 1 and guards.num_refused_steps == 0
    assert guards.judge(1.0, 1.0) is None, "one spike in the window does not move the median"


def test_a_spike_of_the_gradient_alone_is_found() -> None:
    spike = fed(losses=(1.0,) * 8).judge(1.0, 100.0)
    assert spike == Spike("grad_norm", 100.0, 1.0, 1.5)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    assert fed(losses=(1.0,) * 7).judge(1e6, 1e6) is None


def test_a_constant_window_bears_small_changes_and_zeros_have_no_scale() -> None:
    assert fed(losses=(2.0,) * 8).judge(2.9, 1.4) is None
    assert fed(losses=(2.0,) * 8).judge(3.1, 1.0) is not None
    assert fed(losses=(0.0,) * 8).judge(1e-9, 1.0) is None
    # A tokenizer's loss may be below zero, as it holds an entropy.
    assert fed(losses=(-2.0,) * 8).judge(-1.1, 1.0) is None
    assert fed(losses=(-2.0,) * 8).judge(-0.9, 1.0) is not None


def test_a_limit_is_the_formula_written_out() -> None:
    values = np.random.default_rng(0).lognormal(sigma=0.5, size=33)
    median = np.median(values)
    expected = median + 7 * 1.4826 * np.median(np.abs(values - median))
    assert spike_limit(values.tolist(), 7.0) == pytest.approx((median, expected))


def test_the_window_follows_a_logged_spike_but_not_a_skipped_one() -> None:
    for action, is_spike_at_last in (("log", False), ("skip", True)):
        guards = fed(dataclasses.replace(SECTION, spike_action=action), losses=(1.0,) * 8)
        found = [guards.judge(10.0, 1.0) is not None for _ in range(12)]
        assert found[0] and found[-1] == is_spike_at_last
        assert guards.num_refused_steps == (12 if action == "skip" else 0)


def test_no_rule_where_it_is_off() -> None:
    assert not StepGuards(dataclasses.replace(SECTION, spike_deviations=0.0)).judges_spikes


def test_a_value_that_is_not_finite_is_not_remembered() -> None:
    guards = fed(losses=(1.0,) * 7)
    guards.judge(math.nan, 1.0)
    assert guards.judge(1.0, 1.0) is None and guards.state()["loss"] == [1.0] * 8


@pytest.mark.parametrize("action", ["log", "skip"])
def test_a_resumed_run_decides_as_an_unbroken_one(action: str) -> None:
    section = dataclasses.replace(SECTION, spike_action=action, max_skipped_share=1.0, max_skipped_steps=100)
    numbers = np.random.default_rng(1).lognormal(sigma=1.0, size=(200, 2)).tolist()

    def decide(guards: StepGuards, steps: range) -> list[Spike | None]:
        spikes = []
        for step in steps:
            spikes.append(guards.judge(*numbers[step]))
            guards.count(step, spikes[-1] is not None and guards.refuses_spikes)
        return spikes

    unbroken = StepGuards(section)
    expected = decide(unbroken, range(200))
    first, second = StepGuards(section), StepGuards(section)
    begun = decide(first, range(77))
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + decide(second, range(77, 200)) == expected
    assert second.state() == unbroken.state() and unbroken.num_spikes > 0


def test_a_resumed_run_counts_skipped_steps_on() -> None:
    guards, resumed = StepGuards(SECTION), StepGuards(SECTION)
    for step in range(1, 8):
        guards.count(step, is_skipped=step % 2 == 0)
    resumed.restore(guards.state())
    resumed.count(8, is_skipped=True)
    with pytest.raises(TrainingError, match="5 of the last 10 steps"):
        for step in (9, 10):
            resumed.count(step, is_skipped=step == 10)


def test_a_checkpoint_without_a_window_begins_anew() -> None:
    guards = StepGuards(SECTION)
    guards.restore({})
    assert guards.state() == StepGuards(SECTION).state()


def test_a_run_with_another_loss_keeps_its_counts_and_begins_its_windows_again() -> None:
    guards, resumed = fed(losses=(1.0,) * 8), StepGuards(SECTION)
    assert guards.judge(100.0, 1.0) is not None
    guards.count(9, is_skipped=True)
    resumed.restore(guards.state(), keeps_windows=False)
    assert resumed.state() == guards.state() | {"loss": [], "grad_norm": []}
    assert resumed.num_spikes == 1 and resumed.judge(1000.0, 1.0) is None
