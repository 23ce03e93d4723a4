"""Every stage of the recipe and every layout, as chosen ranks of jobs of 8 to 1,024 GPUs: the whole life of each.

Built, two steps, a checkpoint, an evaluation on held-out images. Minutes: `make fake-cuda`.
"""

from __future__ import annotations

import pytest

from tests.fake_cuda.agreement import disagreements, lone_members, standstill
from tests.fake_cuda.cases import ALL_CONFIGS, ALL_LAYOUTS, Case
from tests.fake_cuda.findings import findings
from tests.fake_cuda.walks import Request, walk_of, walks_of

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda"), pytest.mark.timeout(3600)]


@pytest.mark.parametrize("case", [*ALL_CONFIGS, *ALL_LAYOUTS], ids=str)
def test_ranks_of_a_job(case):
    walks = walks_of(case.request(rank, is_uneven=True) for rank in case.chosen_ranks())
    for rank, found in walks.items():
        assert findings(found) == [], f"rank {rank}"
    calls = {rank: found.record.collectives for rank, found in walks.items()}
    assert disagreements(calls) == []
    assert standstill(calls) == []
    # Otherwise the agreement would say nothing of that group.
    assert lone_members(calls) == []


def test_the_whole_of_14b():
    walks = walks_of(
        Case("pt_14b", 64, layers_per_stage=0).request(rank, parts=("steps",), is_uneven=True) for rank in (0, 63)
    )
    for found in walks.values():
        assert found.num_layers == 40
        assert findings(found) == []
        assert not found.waits_of_micro_batches()
    assert disagreements({rank: found.record.collectives for rank, found in walks.items()}) == []


def _planted(fault: str, rank: int) -> Request:
    return Case("pt_0p6b", 8).request(rank, parts=("steps",), plant=fault)


@pytest.mark.parametrize(
    ("fault", "says"),
    [("device", "found at least two devices"), ("dtype", "operands of torch.bfloat16, torch.float32")],
)
def test_a_wrong_tensor_is_found(fault, says):
    with pytest.raises(RuntimeError, match=says):
        walk_of(_planted(fault, 0))


def test_a_wait_is_found():
    found = walk_of(_planted("wait", 0))
    assert sum(found.waits_of_micro_batches().values()) == found.num_micro_batches


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing collective", "allreduce_ of [3] torch.float32 (first micro-batches) on rank 0 and _reduce_scatter"),
        (
            "shape of a collective",
            r"allreduce_ of [3] torch.float32 (first micro-batches) on rank 0 and allreduce_ of [4]",
        ),
        ("dtype of a collective", "and allreduce_ of [3] torch.bfloat16"),
        ("order of collectives", "on rank 0 and allreduce_ of [5]"),
        ("send", "message 0 from rank 1 to rank 0: sent is [3] torch.float32, received missing"),
    ],
)
def test_a_rank_that_differs_is_found(fault, says):
    walks = walks_of(_planted(fault, rank) for rank in (0, 1))
    lines = disagreements({rank: found.record.collectives for rank, found in walks.items()})
    assert any(says in line for line in lines), lines
