"""On a GPU a trace has its kernels, and a memory snapshot lies beside it."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest
import torch

from bitdance_scale.observe.profiler import StepProfiler, snapshot_path, trace_path
from bitdance_scale.phases import Phase, phase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_step_on_a_gpu_is_traced_with_its_kernels_and_its_memory(tmp_path):
    with StepProfiler((2,), tmp_path, 0, is_cuda=True) as profiler:
        for step in (1, 2, 3):
            profiler.begin(step)
            with phase(Phase.FORWARD):
                (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum()
            profiler.end()
    with gzip.open(trace_path(tmp_path, 2, 0), "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    assert "forward" in {event.get("name") for event in events} and "kernel" in {event.get("cat") for event in events}
    with snapshot_path(tmp_path, 2, 0).open("rb") as file:
        assert pickle.load(file)["segments"]
    assert not trace_path(tmp_path, 3, 0).exists()
