"""Traces of steps: the phases are in them, only the chosen steps have one, and failing to write one ends nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from bitdance_scale.observe.profiler import PROFILE_DIR, StepProfiler, trace_path
from bitdance_scale.phases import Phase, phase


def train(profiler: StepProfiler, num_steps: int) -> None:
    with profiler:
        for step in range(1, num_steps + 1):
            profiler.begin(step)
            with phase(Phase.FORWARD):
                (torch.ones(8, 8) @ torch.ones(8, 8)).sum()
            profiler.end()
            with phase(Phase.SAVING):
                torch.ones(3).sum()


def names(path: Path) -> set[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_the_chosen_steps_have_a_trace_with_their_phases(tmp_path):
    train(StepProfiler((2, 4, 9), tmp_path, 3, is_cuda=False), num_steps=5)
    paths = sorted((tmp_path / PROFILE_DIR).iterdir())
    assert paths == [trace_path(tmp_path, step, 3) for step in (2, 4)]
    found = names(paths[0])
    assert {"forward", "aten::mm"} <= found and "saving" not in found


def test_without_steps_nothing_is_written_and_no_phase_is_listened_to(tmp_path):
    from bitdance_scale import phases

    profiler = StepProfiler((), tmp_path, 0, is_cuda=False)
    with profiler:
        assert phases._listeners == []
    train(profiler, num_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    (tmp_path / PROFILE_DIR).write_text("a file in the way", encoding="utf-8")
    train(StepProfiler((1, 2), tmp_path, 0, is_cuda=False), num_steps=3)
    assert "the profile of step 1 could not end; training goes on" in caplog.text
    assert "the profile of step 2 could not end" in caplog.text


def test_an_error_in_a_step_leaves_a_trace_and_no_running_profiler(tmp_path):
    profiler = StepProfiler((1,), tmp_path, 0, is_cuda=False)
    try:
        with profiler:
            profiler.begin(1)
            raise RuntimeError("in the step")
    except RuntimeError:
        pass
    assert trace_path(tmp_path, 1, 0).is_file()
    train(StepProfiler((1,), tmp_path / "other", 0, is_cuda=False), num_steps=1)
    assert trace_path(tmp_path / "other", 1, 0).is_file()
