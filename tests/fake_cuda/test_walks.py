"""The CUDA branches of the 14B's stages, walked as ranks of a large job: devices, dtypes, waits, orders of collectives."""

from __future__ import annotations

import pytest

from tests.fake_cuda.agreement import disagreements
from tests.fake_cuda.walks import STEP, walk, walk_ranks

pytestmark = pytest.mark.usefixtures("fake_cuda")

SHALLOW = ("model.num_layers=2",)


def test_a_step_of_64_gpus():
    walks = walk_ranks("pt_14b", 64, (0, 1), SHALLOW)
    first = walks[0]
    assert first.device == "cuda:0"
    # One read of the counts before, and one of the losses after all micro-batches; none within.
    waits = first.waits("micro-batches")
    print(waits)
    assert disagreements({rank: found.record.collectives for rank, found in walks.items()}) == []


@pytest.mark.parametrize(
    ("plant", "says"),
    [("device", "Unhandled FakeTensor Device Propagation|on cpu|cuda:0, cpu"), ("dtype", "same dtype")],
)
def test_a_wrong_tensor_is_found(plant, says):
    with pytest.raises(RuntimeError, match=says):
        walk("pt_14b", 64, 0, SHALLOW, plant)


def test_a_wait_is_found():
    before, after = walk("pt_14b", 64, 0, SHALLOW), walk("pt_14b", 64, 0, SHALLOW, "wait")
    more = after.waits("micro-batches") - before.waits("micro-batches")
    assert sum(more.values()) == before.num_micro_batches


def test_a_collective_of_one_rank_is_found():
    calls = {rank: walk("pt_14b", 64, rank, SHALLOW, "collective").record.collectives for rank in (0, 1)}
    assert any("call" in line for line in disagreements(calls))
