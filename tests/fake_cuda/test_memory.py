"""What a walk takes on the CUDA branches, against what `bitdance memory` says: within 3 %, kind by kind."""

from __future__ import annotations

from functools import partial

import pytest

from tests.fake_cuda import memory
from tests.fake_cuda.budgets import MEASURED
from tests.fake_cuda.cases import Case
from tests.fake_cuda.server import in_parallel
from tests.fake_cuda.walks import walk_of

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda"), pytest.mark.timeout(3600)]


def _places() -> list[tuple[Case, int]]:
    return [(case, stage) for case in MEASURED for stage in range(case.run.parallel.pipeline)]


@pytest.mark.parametrize(("case", "stage"), _places(), ids=str)
def test_the_estimate_is_what_is_allocated(case, stage):
    request = case.request(case.first_ranks()[stage], parts=("steps",))
    walked, estimated = in_parallel([partial(walk_of, request), partial(memory.estimate, request)])
    assert memory.differences(walked, estimated) == []
