"""Kernels, bytes, collectives, waits and memory of every job against budgets.toml."""

from __future__ import annotations

import pytest

from tests.fake_cuda.budgets import MEASURED, breaches, measure, name_of, read, requests_of
from tests.fake_cuda.walks import walks_of

REWRITE = "python -m tests.fake_cuda.budgets --write rewrites the file"


@pytest.mark.fake_cuda
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_a_job_keeps_its_budget(case):
    walks_of(requests_of([case]))
    for stage in range(case.run.parallel.pipeline):
        assert breaches(measure(case, stage), read()[name_of(case, stage)]) == [], REWRITE


def test_the_file_has_every_job():
    names = [name_of(case, stage) for case in MEASURED for stage in range(case.run.parallel.pipeline)]
    assert list(read()) == names


def test_a_breach_is_named():
    allowed = {"layer_kernels": 72, "layer_kernel_bytes": 10**10, "waits": 0}
    assert breaches(allowed, allowed) == []
    assert breaches(allowed | {"layer_kernel_bytes": 10**10 + 10**8}, allowed) == []
    assert breaches(allowed | {"layer_kernels": 73}, allowed) == ["layer_kernels: 73 instead of 72"]
    assert breaches(allowed | {"waits": 1}, allowed) == ["waits: 1 instead of 0"]
    assert breaches(allowed | {"layer_kernel_bytes": 11 * 10**9}, allowed) == [
        "layer_kernel_bytes: 11,000,000,000 instead of 10,000,000,000"
    ]
    assert breaches({"waits": 0}, {"peak_bytes": 5}) == [
        "peak_bytes: in the file, not measured",
        "waits: 0 measured, not in the file",
    ]
