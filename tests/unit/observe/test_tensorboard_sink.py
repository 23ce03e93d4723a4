"""TensorBoard shows what W&B shows, every step once; what it cannot write does not end a run."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.metric_sink import EVALUATION_PANELS, STEP_PANELS, panel_values
from bitdance_scale.observe.metrics import Evaluation
from bitdance_scale.observe.tensorboard_sink import TENSORBOARD_DIR, TensorboardSink
from tests.unit.observe.test_metrics import point


def shown(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / TENSORBOARD_DIR), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def log(folder: Path, steps: range, resumed_step: int, loss: float) -> None:
    sink = TensorboardSink(folder, resumed_step)
    for step in steps:
        sink.log(point(step, loss=loss), STEP_PANELS)
    sink.finish()


def test_the_names_and_values_are_those_of_wandb(tmp_path):
    sink = TensorboardSink(tmp_path, 0)
    record, evaluation = point(3, mfu=0.5), Evaluation(3, 0.5, {64: 0.4}, (0.25, 0.75), 9.0)
    sink.log(record, STEP_PANELS)
    sink.log(evaluation, EVALUATION_PANELS, 24)
    sink.finish()
    found, expected = shown(tmp_path), panel_values(record, STEP_PANELS) | panel_values(evaluation, EVALUATION_PANELS)
    assert set(found.Tags()["scalars"]) == expected.keys()
    for name, value in expected.items():
        for event in found.Scalars(name):
            # Stored as float32.
            assert (event.step, event.value) == (3, pytest.approx(value, rel=1e-6))


def test_a_picture_is_shown_at_its_step(tmp_path):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[1, 2] = (255, 128, 0)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    sink = TensorboardSink(tmp_path, 0)
    sink.log_image(5, "samples", tmp_path / "grid.png", "step 5")
    sink.finish()
    (event,) = shown(tmp_path).Images("samples")
    assert (event.step, event.height, event.width) == (5, 4, 6)


def test_a_run_that_goes_on_from_an_earlier_step_shows_each_step_once(tmp_path):
    log(tmp_path, range(1, 8), resumed_step=0, loss=1.0)
    log(tmp_path, range(5, 10), resumed_step=4, loss=2.0)
    events = [(event.step, event.value) for event in shown(tmp_path).Scalars("loss/total")]
    assert events == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 10)]


def test_a_run_that_starts_afresh_shows_nothing_of_before(tmp_path):
    log(tmp_path, range(4), resumed_step=0, loss=1.0)
    log(tmp_path, range(2), resumed_step=0, loss=2.0)
    assert [(e.step, e.value) for e in shown(tmp_path).Scalars("loss/total")] == [(0, 2.0), (1, 2.0)]


def test_without_the_package_the_way_to_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="observe.tensorboard = true: .*`pip install tensorboard`"):
        TensorboardSink(tmp_path, 0)


def test_after_a_full_disk_later_points_are_written(tmp_path, monkeypatch):
    sink = TensorboardSink(tmp_path, 0)
    sink.log(point(1), STEP_PANELS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sink._writer, "flush", full)
        with pytest.raises(OSError):
            sink.log(point(2), STEP_PANELS)
    sink.log(point(3), STEP_PANELS)
    sink.finish()
    assert {1, 3} <= {event.step for event in shown(tmp_path).Scalars("loss/total")}
