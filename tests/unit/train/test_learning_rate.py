from __future__ import annotations

import math

import pytest

from bitdance_scale.config.schema import OptimSection
from bitdance_scale.config.tokenizer_schema import TokenizerOptimSection
from bitdance_scale.train.learning_rate import learning_rate


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (10_000, 1.0)])
def test_rate_warms_up_and_stays(step, share):
    assert learning_rate(OptimSection(lr=2e-4, warmup_steps=4), step, 20_000) == pytest.approx(2e-4 * share)


def test_rate_without_warmup_is_whole_at_once():
    assert learning_rate(OptimSection(lr=2e-4, warmup_steps=0), 0, 100) == 2e-4


@pytest.mark.parametrize(("step", "share"), [(0, 0.5), (1, 1.0), (59, 1.0), (60, 1.0), (80, 0.5), (99, 0.025)])
def test_rate_falls_at_the_end(step, share):
    section = OptimSection(lr=2e-4, warmup_steps=2, decay_steps=40)
    assert learning_rate(section, step, 100) == pytest.approx(2e-4 * share)
    # Going on with more steps goes on at the whole rate.
    assert learning_rate(section, step, 200) == pytest.approx(2e-4 * min(1, (step + 1) / 2))


def test_rate_of_a_run_shorter_than_its_decay_falls_all_the_way():
    section = OptimSection(lr=2e-4, warmup_steps=0, decay_steps=40)
    assert [learning_rate(section, step, 4) / 2e-4 for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])],
)
def test_rate_falls_from_the_warmup_to_its_floor(schedule, shares):
    section = OptimSection(lr=5e-4, lr_min=1e-4, warmup_steps=2, schedule=schedule)
    warmup = [0.5, 1, 1, 1, 1, 1]
    # Of the part above the floor; both warm up.
    wanted = [4e-4 * share + 1e-4 * warm for share, warm in zip(shares, warmup, strict=True)]
    assert [learning_rate(section, step, 6) for step in range(6)] == pytest.approx(wanted)
    assert learning_rate(section, 10**6 - 1, 10**6) == pytest.approx(1e-4, rel=1e-4)


def test_rate_of_a_tokenizer_falls_as_a_cosine_to_zero_unless_told_otherwise():
    section = TokenizerOptimSection(lr=0.4, warmup_steps=10)
    wanted = {0: 0.04, 9: 0.4, 10: 0.4, 60: 0.2, 85: 0.2 * (1 + math.cos(0.75 * math.pi))}
    assert {step: learning_rate(section, step, 110) for step in wanted} == pytest.approx(wanted)
    assert 0 < learning_rate(section, 109, 110) < 1e-3
    # A run that ends within its warm-up only warms up.
    assert [learning_rate(section, step, 4) for step in range(4)] == pytest.approx([0.04, 0.08, 0.12, 0.16])
    constant = TokenizerOptimSection(lr=0.4, warmup_steps=0, schedule="constant")
    assert learning_rate(constant, 99, 100) == 0.4
