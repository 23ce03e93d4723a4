"""The terms of the roofline against values worked out by hand."""

from __future__ import annotations

import pytest

from bitdance_scale.planning.roofline import (
    bubble_s,
    bubble_share,
    gather_s,
    group_rate,
    moved_s,
    products_s,
    send_s,
    sum_s,
)


def test_products_and_bytes_are_divided_by_their_rates():
    assert products_s(6e12, rate=3e12) == 2.0
    assert moved_s(5e9, rate=2e12) == 2.5e-3


def test_a_gather_sends_all_but_the_own_part():
    # 80 MB on 4 ranks: 60 MB at 300 MB/s, and 20 ms to start.
    assert gather_s(80e6, num_ranks=4, rate=300e6, message_s=0.02) == pytest.approx(0.22)
    assert sum_s(80e6, num_ranks=4, rate=300e6, message_s=0.02) == pytest.approx(0.44)
    assert gather_s(80e6, num_ranks=1, rate=300e6, message_s=0.02) == 0.0


def test_a_gather_over_more_ranks_sends_more():
    times = [gather_s(1e9, num_ranks=ranks, rate=1e9, message_s=0.0) for ranks in (1, 2, 4, 8)]
    assert times == sorted(times) and times[-1] < 1.0


def test_a_message_has_a_fixed_part():
    assert send_s(1e6, rate=1e9, message_s=1e-3) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "num_micro", "share"), [(1, 1, 8, 0), (4, 1, 12, 0.25), (4, 2, 12, 0.125)]
)
def test_the_bubble_is_that_of_narayanan(pipeline, virtual, num_micro, share):
    assert bubble_share(pipeline, virtual, num_micro) == share
    # With equal ranks the seconds agree with the share.
    busy_s = num_micro * 0.5
    assert bubble_s([0.5] * pipeline, virtual) == pytest.approx(share * busy_s)


def test_the_slowest_rank_waits_for_the_others_alone():
    assert bubble_s([0.3, 0.5, 0.2], 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("num_ranks", "stride", "expected"),
    [
        (8, 1, (450.0, False)),
        # Neighbours 4 ranks apart: two of the group in a node of 8, which share two adapters.
        (16, 4, (100.0, True)),
        (2, 4, (450.0, False)),
        (8, 8, (50.0, True)),
        # All eight adapters together would be faster than a GPU's own link.
        (64, 1, (400.0, True)),
        (1, 64, (450.0, False)),
    ],
)
def test_a_ring_has_the_adapters_of_its_members(num_ranks, stride, expected):
    assert group_rate(num_ranks, stride, gpus_per_node=8, node_rate=450.0, network_rate=50.0) == expected
