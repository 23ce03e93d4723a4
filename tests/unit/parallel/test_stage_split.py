"""The split of the backbone over pipeline stages: that it is optimal, and the costs behind it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.parallel.stage_split import (
    StageCosts,
    balanced_split,
    even_split,
    stage_costs,
    stage_layers,
    stage_split,
    typical_counts,
)

VOCAB_SIZE = 151940


def pretraining(*overrides: str) -> RunConfig:
    """The 14B configuration of the PT stage."""
    return load_config("pt_14b", overrides)


@given(st.floats(0.1, 10.0), st.floats(0.0, 60.0), st.floats(0.0, 60.0), st.integers(1, 10), st.integers(1, 4))
def test_no_split_has_a_faster_slowest_stage(
    layer: float, first: float, last: float, num_layers: int, num_stages: int
) -> None:
    num_stages = min(num_stages, num_layers)
    costs = StageCosts(layer, first, last, encoder=1.0)
    found = balanced_split(costs, num_layers, num_stages)
    assert sum(found) == num_layers and min(found) >= 1 and len(found) == num_stages
    counts = itertools.product(range(1, num_layers + 1), repeat=num_stages)
    best = min(max(costs.of_stages(split)) for split in counts if sum(split) == num_layers)
    assert max(costs.of_stages(found)) == pytest.approx(best)


def test_14b_over_four_ranks_beats_the_even_split() -> None:
    config = pretraining("parallel.pipeline=4")
    costs, split = stage_costs(config, VOCAB_SIZE), stage_split(config, VOCAB_SIZE)
    even = even_split(40, 4)
    assert even == (10, 10, 10, 10) and split == (11, 11, 11, 7)
    # The head costs 4.8 layers at the PT mix (5.2 by parameters, but text positions do not pass through it).
    assert costs.last / costs.layer == pytest.approx(4.8, abs=0.1)
    assert max(costs.of_stages(even)) / max(costs.of_stages(split)) > 1.2


def test_costs_are_those_of_the_step() -> None:
    """Over all stages they add up to the training FLOPs from which utilisation is computed."""
    from bitdance_scale.observe.cost import encode_flops, step_flops

    config = pretraining("parallel.pipeline=4", "parallel.tensor=2", "parallel.recompute=none")
    num_images, counts = typical_counts(config)
    costs = stage_costs(config, VOCAB_SIZE)
    total = sum(costs.of_stages(stage_split(config, VOCAB_SIZE))) * num_images
    assert total == pytest.approx(step_flops(config, VOCAB_SIZE, counts).training)
    # Eight ranks divide the images of a step.
    assert costs.encoder * 8 * num_images == pytest.approx(encode_flops(config.vision, counts.num_vision))
    assert sum(costs.of_ranks((10, 10, 10, 10), 4)) * num_images == pytest.approx(
        total + 4 * costs.encoder * num_images
    )


def test_recomputation_weighs_layers_and_head_alike() -> None:
    kept, again = (stage_costs(pretraining(f"parallel.recompute={how}"), VOCAB_SIZE) for how in ("none", "full"))
    assert again.layer / kept.layer == pytest.approx(4 / 3)
    assert again.first == kept.first
    assert kept.last < again.last < kept.last * 4 / 3, "text logits are not recomputed"


def test_the_mix_is_that_of_the_paper() -> None:
    """Vision tokens of an average PT image: 0.2 * 256 + 0.7 * 1024 + 0.1 * 4096 = 1178 for square images (Table 4)."""
    num_images, counts = typical_counts(pretraining())
    assert counts.num_vision / num_images == pytest.approx(1178, rel=0.05)
    assert counts.num_predicted == counts.num_vision


def test_split_by_hand_and_interleaved_stages() -> None:
    config = pretraining("parallel.pipeline=2", "parallel.pipeline_split=[25, 15]")
    assert stage_split(config, VOCAB_SIZE) == (25, 15)
    assert stage_layers(config, VOCAB_SIZE, 1) == range(25, 40)
    interleaved = pretraining("parallel.pipeline=4", "parallel.virtual_stages=2")
    split = stage_split(interleaved, VOCAB_SIZE)
    assert len(split) == 8 and sum(split) == 40 and split[-1] == min(split)
    costs = stage_costs(interleaved, VOCAB_SIZE)
    # Rank 3 holds stages 3 and 7.
    ranks = costs.of_ranks(split, 4)
    assert ranks[3] == pytest.approx(costs.encoder + (split[3] + split[7]) * costs.layer + costs.last)
