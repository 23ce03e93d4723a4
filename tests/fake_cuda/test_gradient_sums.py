"""Sums of gradients and messages between stages of a 14B stage on CUDA: how many, in which dtype, and who waits."""

from __future__ import annotations

import pytest

from tests.fake_cuda.recording import Collective
from tests.fake_cuda.walks import walk, walk_ranks

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda")]

SHALLOW = ("model.num_layers=2",)
PIPELINE = ("model.num_layers=4", "parallel.pipeline=4", "parallel.tensor=2")
TENSOR, DATA = 4, 16
# Two norms of 5,120 channels and two of 128 in each of two layers, and the last one.
NORM_ELEMENTS = 2 * (2 * 5120 + 2 * 128) + 5120


def _vectors(calls: list[Collective], num_ranks: int) -> list[tuple[str, str, int]]:
    """(operation, dtype, elements) of sums of one vector in groups of so many ranks."""
    return [
        (call.name, call.dtype, call.shapes[0][0])
        for call in calls
        if call.phase == "micro-batches"
        and len(call.ranks) == num_ranks
        and [len(shape) for shape in call.shapes] == [1]
        # Counts of targets, and losses.
        and call.shapes[0][0] > 2
    ]


def test_gradients_are_summed_once_per_step_in_float32():
    calls = walk("pt_14b", 64, 0, SHALLOW).record.collectives
    over_tensor = _vectors(calls, TENSOR)
    # The cross-entropy also sums vectors, one element for every target.
    assert {dtype for _, dtype, _ in over_tensor} == {"torch.float32"}
    assert over_tensor[-1] == ("allreduce_", "torch.float32", NORM_ELEMENTS)
    assert [number for _, _, number in over_tensor].count(NORM_ELEMENTS) == 1
    over_data = _vectors(calls, DATA)
    assert [(name, dtype) for name, dtype, _ in over_data] == [("_reduce_scatter_base_", "torch.float32")]


def test_a_pipeline_waits_for_the_device_at_its_ends_alone():
    walks = walk_ranks("pt_14b", 64, (0, 16), PIPELINE)
    for found in walks.values():
        assert {place.split()[-1] for _, place in found.waits("micro-batches")} == {"count_targets", "_reduce_losses"}
