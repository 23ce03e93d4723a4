"""A part of a benchmark's prompts: even over the categories, and the same every time."""

from __future__ import annotations

from collections import Counter

import pytest

from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.benchmarks.subset import choose_prompts

PROMPTS = DemoScenes(per_category=6).read(None)


@pytest.mark.parametrize("num_prompts", [1, 6, 20, 35])
def test_categories_have_as_many_as_each_other(num_prompts: int) -> None:
    chosen = choose_prompts(PROMPTS, num_prompts)
    counts = Counter(prompt.category for prompt in chosen)
    assert len(chosen) == num_prompts and max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == min(num_prompts, 6)
    assert [prompt.id for prompt in chosen] == sorted(prompt.id for prompt in chosen)


def test_a_choice_is_fixed_and_does_not_depend_on_the_order_of_the_file() -> None:
    assert [prompt.id for prompt in choose_prompts(PROMPTS, 8)] == [
        "00004", "00006", "00007", "00018", "00019", "00021", "00029", "00032",
    ]  # fmt: skip
    backwards = [*reversed(PROMPTS[::-1][6:]), *PROMPTS[-6:]][::-1]
    assert {prompt.id for prompt in choose_prompts(backwards, 12)} == {p.id for p in choose_prompts(PROMPTS, 12)}
    assert {prompt.id for prompt in choose_prompts(PROMPTS, 12)} < {p.id for p in choose_prompts(PROMPTS, 18)}


def test_small_categories_leave_their_part_to_the_others() -> None:
    prompts = [Prompt(f"{category}{number}", "x", category, 1, {}) for category in "ab" for number in range(5)][4:]
    assert Counter(prompt.category for prompt in choose_prompts(prompts, 4)) == {"a": 1, "b": 3}


def test_all_are_chosen_by_0_and_where_there_are_not_as_many() -> None:
    assert choose_prompts(PROMPTS, 0) == choose_prompts(PROMPTS, 99) == PROMPTS
