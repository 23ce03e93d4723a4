"""When the host does something else in a step: with work on the device, and outside a pipeline's schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bitdance_scale.config.schema import LossSection
from bitdance_scale.parallel import step
from bitdance_scale.parallel.step import TargetCounts


class _Engine:
    loss_factor = 1

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def forward(self, inputs: int) -> torch.Tensor:
        self._events.append(f"forward {inputs}")
        return torch.ones(2)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._events.append("last backward" if is_last else "backward")


@pytest.mark.parametrize(
    ("pipeline_size", "expected"),
    [
        (1, ["forward 0", "backward", "meanwhile", "forward 1", "backward", "forward 2", "last backward"]),
        (2, ["schedule", "meanwhile"]),
    ],
)
def test_the_host_does_something_else_with_work_on_the_device(monkeypatch, pipeline_size, expected):
    events: list[str] = []
    monkeypatch.setattr(step, "_run_pipeline", lambda *_: events.append("schedule") or [])
    topology = SimpleNamespace(pipeline_size=pipeline_size)
    counts = TargetCounts(1, 1)
    step._run_micro_batches(
        _Engine(events), range(3), counts, LossSection(), topology, lambda: events.append("meanwhile")
    )
    assert events == expected
