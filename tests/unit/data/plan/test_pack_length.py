"""The cap that wastes least, against counting positions by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bitdance_scale.data.plan.pack_length import pack_lengths
from bitdance_scale.data.plan.packing import CostModel, fits, partition_batch


def test_caps_are_the_shortest_and_what_they_waste_is_counted(make_config) -> None:
    config, num_ranks, multiple = make_config(), 4, 16
    cost_model = CostModel.of_model(config.model)
    numbers = np.random.default_rng(0)
    batches = [numbers.choice([40, 137, 530], size=120, p=[0.3, 0.6, 0.1]) for _ in range(6)]
    choices = pack_lengths(config, batches[:3], batches[3:], num_ranks, 2000, multiple)
    assert [choice.num_packs for choice in choices] == sorted({choice.num_packs for choice in choices})
    assert len(choices) > 4 and choices[0].max_pack_tokens <= 2000
    # No cap can be shorter than the longest sample.
    assert choices[-1].max_pack_tokens == 544 < choices[-2].max_pack_tokens
    for choice in choices:
        cap, num_packs = choice.max_pack_tokens, choice.num_packs * num_ranks
        assert cap % multiple == 0
        assert all(fits(batch, num_packs, cap, cost_model) for batch in batches[:3])
        shorter = cap - multiple
        assert shorter < 530 or not all(fits(batch, num_packs, shorter, cost_model) for batch in batches[:3])
        dealt = [partition_batch(batch, num_ranks, cap, cost_model, 1, multiple) for batch in batches]
        packs = [
            batch[pack].sum() for batch, ranks in zip(batches, dealt, strict=True) for rank in ranks for pack in rank
        ]
        used = sum(batch.sum() for batch in batches)
        assert choice.padding_fixed == pytest.approx(1 - used / (len(packs) * cap))
        assert choice.padding_variable == pytest.approx(
            1 - used / sum(-(-size // multiple) * multiple for size in packs)
        )
        assert choice.more_packs == sum(len(ranks[0]) > choice.num_packs for ranks in dealt) / 6
        assert choice.slowest >= 1
    dealt = [partition_batch(batch, num_ranks, 2000, cost_model) for batch in batches]
    longest = 1 - sum(batch.sum() for batch in batches) / (sum(len(rank) for ranks in dealt for rank in ranks) * 2000)
    assert min(choice.padding_fixed for choice in choices) < 0.07 < 0.2 < longest


def test_packs_that_cannot_hold_a_sample_are_no_choice(make_config) -> None:
    batch = np.array([100, 700, 100])
    assert pack_lengths(make_config(), [batch], [], 1, 640, 16) == []
    assert [choice.max_pack_tokens for choice in pack_lengths(make_config(), [batch], [], 1, 800, 16)] == [704]
    # Four replicas need four samples.
    assert pack_lengths(make_config(), [batch], [], 4, 800, 16) == []
