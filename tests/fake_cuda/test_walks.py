"""The CUDA branches of a 14B stage, walked as ranks of a large job: devices, dtypes, waits, orders of collectives.

The short set of every test run: six walks of one layer, a minute of processor time. `make fake-cuda` walks the rest.
"""

from __future__ import annotations

import re

import pytest

from tests.fake_cuda.agreement import disagreements, standstill
from tests.fake_cuda.cases import Case
from tests.fake_cuda.findings import findings
from tests.fake_cuda.walks import Walk, walks_of

# Walks end by themselves (`walks.py`).
pytestmark = [pytest.mark.usefixtures("fake_cuda"), pytest.mark.timeout(1800)]


def _walks(case: Case, ranks: tuple[int, ...], **options: object) -> dict[int, Walk]:
    return walks_of(case.request(rank, **options) for rank in ranks)


def test_tensor_parallel_neighbours_of_64():
    case = Case("pt_14b", 64)
    walks = _walks(case, (0, 1), is_uneven=True)
    for found in walks.values():
        assert findings(found) == []
        assert not found.waits_of_micro_batches()
    calls = {rank: found.record.collectives for rank, found in walks.items()}
    assert disagreements(calls) == []
    assert standstill(calls) == []


def test_both_ends_of_a_pipeline_with_a_tied_embedding():
    case = Case("pt_0p6b", 8, "pipeline 2")
    walks = _walks(case, tuple(case.first_ranks()), parts=("steps",), is_uneven=True)
    for found in walks.values():
        assert findings(found) == []
    calls = {rank: found.record.collectives for rank, found in walks.items()}
    assert disagreements(calls) == []
    assert standstill(calls) == []
    # The packs have several lengths, and every one of them is sent forward and backward.
    sent = {call.shapes[0][0] for call in calls[0] if call.name == "send" and call.phase == "micro-batches"}
    assert len(sent) > 1
    assert sent <= {call.shapes[0][0] for call in calls[0] if call.name == "recv_"}


def test_a_planted_fault_is_found():
    case = Case("pt_0p6b", 8)
    walks = _walks(case, (0, 1), parts=("steps",), plant="order of collectives")
    lines = disagreements({rank: found.record.collectives for rank, found in walks.items()})
    assert any(
        re.search(r"call \d+ is allreduce_ of \[3\] .* on rank 0 and allreduce_ of \[5\]", line) for line in lines
    )
