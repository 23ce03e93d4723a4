"""The partition of a global batch into packs: invariants on random batches, and how even the ranks are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance_scale.config.schema import ModelSection
from bitdance_scale.data.plan.packing import CostModel, _fill_cheapest, _fill_fullest, _open_empty, partition_batch
from bitdance_scale.errors import ConfigError

QWEN3_14B = ModelSection(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=8, ffn_size=17408)
COST = CostModel.of_model(QWEN3_14B)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=120),
    num_ranks=st.integers(1, 9),
    capacity=st.integers(500, 2000),
    # With 1.0, long samples cost so much that an exchange that would even out the ranks often has no room.
    quadratic=st.sampled_from([COST.quadratic, 1.0]),
    multiple=st.integers(1, 4),
)
def test_invariants(lengths: list[int], num_ranks: int, capacity: int, quadratic: float, multiple: int) -> None:
    sizes = np.array(lengths)
    try:
        ranks = partition_batch(sizes, num_ranks, capacity, CostModel(quadratic), multiple)
    except ConfigError as error:
        # Refused only when packs would be empty, never because lengths are awkward.
        assert "data.global_batch" in str(error)
        num_packs = int(str(error).split(": ")[1].split()[0])
        assert num_packs * num_ranks > len(lengths)
        return
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    packs = [pack for rank in ranks for pack in rank]
    assert all(packs)
    assert sorted(place for pack in packs for place in pack) == list(range(len(lengths)))
    assert all(sizes[pack].sum() <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    # Fewest packs: at least as many as the tokens need, and never a whole pack per rank more than twice that.
    least = -(-sizes.sum() // (capacity * num_ranks))
    assert len(ranks[0]) % multiple == 0
    assert least <= len(ranks[0]) < 2 * least + multiple
    assert ranks == partition_batch(sizes, num_ranks, capacity, CostModel(quadratic), multiple)


def test_full_packs_are_found() -> None:
    """Longest first into the cheapest pack leaves a 2 over here; into the fullest pack, both fill up."""
    ranks = partition_batch(np.array([6, 4, 3, 3, 2, 2]), 1, 10, CostModel(0.0))
    assert sorted(ranks[0]) == [[0, 1], [2, 3, 4, 5]]


def test_empty_packs_take_from_the_fullest() -> None:
    packs = [[4, 2, 1], [], [3, 0], []]
    _open_empty(packs)
    assert packs == [[4], [1], [3, 0], [2]]


def test_exchanges_even_out_what_longest_first_leaves() -> None:
    lengths = np.array([3, 3, 2, 2, 2])
    ranks = partition_batch(lengths, 2, 100, CostModel(0.0))
    assert sorted(int(sum(lengths[pack].sum() for pack in rank)) for rank in ranks) == [6, 6]


def test_exchanges_keep_to_the_cap() -> None:
    """Two ranks of two packs of 10, with samples of 9 and of 1: only overfull packs would make the ranks even."""
    lengths = np.array([9, 9, 9] + [1] * 10)
    ranks = partition_batch(lengths, 2, 10, CostModel(1.0))
    assert all(lengths[pack].sum() <= 10 for rank in ranks for pack in rank)


def pretraining_lengths(seed: int) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    images = np.repeat([256, 1024, 4096], [512, 1792, 256])
    return images + 20 + np.minimum(numbers.lognormal(3.8, 0.6, len(images)), 512).astype(np.int64)


@pytest.mark.parametrize("num_ranks", [8, 64, 256])
def test_pretraining_ranks_are_even(num_ranks: int) -> None:
    lengths = pretraining_lengths(0)
    ranks = partition_batch(lengths, num_ranks, 16_384, COST)
    costs = COST.costs(lengths)
    rank_costs = np.array([sum(costs[pack].sum() for pack in rank) for rank in ranks])
    # The slowest rank over the mean that the loader aims for at 256 ranks.
    assert rank_costs.max() / rank_costs.mean() <= 1.005


@pytest.mark.parametrize("num_ranks", [64, 192, 256])
def test_continued_training_ranks_are_even(num_ranks: int) -> None:
    """A rank has ten images, half of them four times as expensive: exchanging single ones leaves 3 % at 256 ranks."""
    numbers = np.random.default_rng(0)
    images = np.concatenate([numbers.choice([4096, 4032, 3840], 1240), numbers.choice([1024, 960], 1240)])
    lengths = images + 20 + np.minimum(numbers.lognormal(3.8, 0.6, len(images)), 512).astype(np.int64)
    ranks = partition_batch(lengths, num_ranks, 8960, COST)
    costs = COST.costs(lengths)
    rank_costs = np.array([sum(costs[pack].sum() for pack in rank) for rank in ranks])
    assert rank_costs.max() / rank_costs.mean() <= 1.005


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"data.max_pack_tokens=100: a sample of the batch has 101 positions"):
        partition_batch(np.array([5, 101]), 1, 100, COST)
    with pytest.raises(ConfigError, match=r"data.global_batch=3: 1 packs on each of 4 .* need at least 4 samples"):
        partition_batch(np.array([5, 5, 5]), 4, 100, COST)


def test_cost_model_counts_the_layer() -> None:
    """Weights of a Qwen3-14B layer, written out: q and o 5120 x 5120, k and v 5120 x 1024, three of 5120 x 17408."""
    weights = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 17408
    # Per pair of tokens: scores and values, a multiply-add each per channel, half of the pairs masked: 5120 in all.
    assert COST.quadratic == pytest.approx(5120 / weights, rel=1e-12)  # Two roundings of float64 at most.


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    num_packs=st.integers(1, 12),
    capacity=st.integers(60, 200),
    prefers_cheapest=st.booleans(),
)
def test_filling_is_what_looking_at_every_pack_would_do(
    lengths: list[int], num_packs: int, capacity: int, prefers_cheapest: bool
) -> None:
    """The heaps against the rule written out, ties to the first pack included."""
    lengths = sorted(lengths, reverse=True)
    costs = [length * length % 97 for length in lengths]
    expected: list[list[int]] | None = [[] for _ in range(num_packs)]
    for place, length in enumerate(lengths):
        room = [capacity - sum(lengths[other] for other in pack) for pack in expected]
        score = [sum(costs[other] for other in pack) for pack in expected] if prefers_cheapest else room
        fitting = [pack for pack in range(num_packs) if room[pack] >= length]
        if not fitting:
            expected = None
            break
        expected[min(fitting, key=lambda pack: (score[pack], pack))].append(place)
    order = list(range(len(lengths)))
    if prefers_cheapest:
        assert _fill_cheapest(order, lengths, costs, num_packs, capacity) == expected
    else:
        assert _fill_fullest(order, lengths, num_packs, capacity) == expected
