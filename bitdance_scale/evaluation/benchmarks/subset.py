"""A fixed part of the prompts of a benchmark, the same for every run and model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bitdance_scale.evaluation.benchmarks.prompt import Prompt


def choose_prompts(prompts: Sequence[Prompt], num_prompts: int) -> list[Prompt]:
    """So many prompts, spread as evenly over the categories as these allow, in the order of the benchmark.

    Which ones of a category is decided by the digests of their ids alone. Every choice is part of any larger one in
    which each category has at least as many.

    Args:
        prompts: of a benchmark.
        num_prompts: how many, or all where there are not as many; 0: all.
    """
    if num_prompts == 0:
        return list(prompts)
    ranks: dict[str, int] = {}
    by_category: dict[str, int] = {}
    for prompt in sorted(prompts, key=lambda prompt: hashlib.blake2b(prompt.id.encode(), digest_size=8).digest()):
        ranks[prompt.id] = by_category.get(prompt.category, 0)
        by_category[prompt.category] = ranks[prompt.id] + 1
    order = {category: place for place, category in enumerate(dict.fromkeys(prompt.category for prompt in prompts))}
    # The first of every category, then the second of every category, ...
    chosen = sorted(prompts, key=lambda prompt: (ranks[prompt.id], order[prompt.category]))[:num_prompts]
    ids = {prompt.id for prompt in chosen}
    return [prompt for prompt in prompts if prompt.id in ids]
