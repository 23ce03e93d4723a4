"""Sums of gradients and messages between stages of a 14B stage on CUDA: how many, in which dtype, and who waits."""

from __future__ import annotations

import pytest

from tests.fake_cuda.recording import Collective
from tests.fake_cuda.walks import walk, walk_ranks

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda")]

SHALLOW = ("model.num_layers=2",)
PIPELINE = ("model.num_layers=4", "parallel.pipeline=4", "parallel.tensor=2")
TENSOR, DATA = 4, 16


def _vectors(calls: list[Collective], num_ranks: int) -> list[tuple[str, str]]:
    """(operation, dtype) of sums of one vector in groups of so many ranks."""
    return [
        (call.name, call.dtype)
        for call in calls
        if call.phase == "micro-batches"
        and len(call.ranks) == num_ranks
        and call.name != "send"
        and all(len(shape) == 1 and shape[0] > 2 for shape in call.shapes)
    ]


def test_gradients_are_summed_once_per_step_in_float32():
    calls = walk("pt_14b", 64, 0, SHALLOW).record.collectives
    assert _vectors(calls, TENSOR) == [("allreduce_", "torch.float32")]
    assert _vectors(calls, DATA) == [("_reduce_scatter_base_", "torch.float32")]


def test_a_pipeline_waits_for_the_device_at_its_ends_alone():
    walks = walk_ranks("pt_14b", 64, (0, 16), PIPELINE)
    for found in walks.values():
        assert {place.split()[-1] for _, place in found.waits("micro-batches")} == {"count_targets", "_reduce_losses"}
