"""A run is shown while it is written, before it has begun, after it has ended, and when its files are damaged."""

from __future__ import annotations

import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.app import fragments
from bitdance_scale.app.run_watch import RunWatch
from bitdance_scale.observe.benchmark_scores import BENCHMARKS_FILE, BenchmarkScores
from bitdance_scale.observe.metrics import METRICS_FILE, append_record
from bitdance_scale.train.run_lock import LOCK_FILE
from tests.unit.observe.test_metrics import point
from tests.unit.observe.test_overview import held_out, write_run


class Clock:
    """A clock that stands still until a test moves it, but that drawing takes a second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.5
        return self.now_s


def test_a_folder_without_anything(tmp_path):
    watch = RunWatch(tmp_path / "demo")
    for _ in range(2):
        view = watch.look()
        assert (view.name, view.panels, view.held_out, view.scores) == ("demo", [], None, None)
        assert "There is no metrics.jsonl in" in view.problem and "first logged step" in view.problem
        assert watch.sample_steps() == [] and watch.sample_png(1) is None and not watch.is_training
        (tmp_path / "demo").mkdir(exist_ok=True)
    assert fragments.run_panels(view.panels) == "" == fragments.run_tables(view)
    # An empty file, as a run has it before its first logged step.
    (tmp_path / "demo" / METRICS_FILE).write_text("")
    watch = RunWatch(tmp_path / "demo")
    assert watch.look().summary == "no step logged yet" and len(watch.look().panels) == 12


def test_a_run_is_followed_while_it_is_written(tmp_path):
    folder = write_run(tmp_path / "demo", [point(step) for step in (1, 2)], [held_out(0), held_out(2, 0.4)])
    clock = Clock()
    watch = RunWatch(folder, clock)
    first = watch.look()
    assert first.problem == "" and first.summary.startswith("2 steps") and len(first.panels) == 12
    assert all(np.asarray(Image.open(io.BytesIO(panel.png))).shape[:2] > (300, 400) for panel in first.panels)
    assert first.held_out.header == ["Step", "Flow loss", "256 px", "512 px", "Text loss"]
    assert first.held_out.rows[0] == ["2", "0.4", "0.4", "0.44", "2"] and first.scores is None
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(point(3).to_json() + "\n" + point(4).to_json()[:40])
    # Drawing took half a second by this clock, so it is not drawn again for four and a half.
    assert watch.look() is first
    clock.now_s += 5
    second = watch.look()
    assert second.summary.startswith("3 steps") and second.stamp != first.stamp
    clock.now_s += 5
    assert watch.look() is second
    append_record(
        folder / BENCHMARKS_FILE,
        BenchmarkScores(3, "scenes", "exact", {"overall": 0.25}, {"overall": 0.1}, {"overall": 0.4}, 24, 1.0),
    )
    third = watch.look()
    assert third.scores.rows == [["scenes: exact", "3", "0.25", "0.1 to 0.4", "24"]] and len(third.panels) == 13
    assert "Benchmarks" in fragments.run_tables(third) and fragments.run_panels(third.panels).count("<img") == 13


def test_whether_it_is_training_now(tmp_path):
    folder = write_run(tmp_path / "demo", [point(1)])
    watch = RunWatch(folder)
    view = watch.look()
    assert not watch.is_training and "not training now" in fragments.run_head(view, watch.is_training)
    (folder / LOCK_FILE).write_text("{}")
    assert watch.is_training and ">training<" in fragments.run_head(view, watch.is_training)
    # Its process was killed an hour ago.
    os.utime(folder / LOCK_FILE, (time.time() - 3600,) * 2)
    assert not watch.is_training


def test_a_damaged_line_is_named(tmp_path):
    folder = write_run(tmp_path / "demo", [point(1)])
    (folder / METRICS_FILE).write_text("{broken\n" + point(2).to_json() + "\n")
    problem = RunWatch(folder).look().problem
    assert problem.startswith("The files of the run cannot be read: ") and "metrics.jsonl, line 1" in problem
    (folder / METRICS_FILE).unlink()
    (folder / "config.toml").write_text("[run")
    assert RunWatch(folder).look().problem.startswith("The files of the run cannot be read: ")


def test_samples_by_step(tmp_path):
    folder = write_run(tmp_path / "demo", [point(1)])
    (folder / "samples").mkdir()
    for step in (400, 1000000, 50):
        (folder / f"samples/step_{step:06d}.png").write_bytes(str(step).encode())
    (folder / "samples/step_000060.png.tmp").write_bytes(b"half")
    (folder / "samples/step_best.png").write_bytes(b"somebody's")
    watch = RunWatch(folder)
    assert watch.sample_steps() == [1000000, 400, 50]
    assert watch.sample_png(400) == b"400" and watch.sample_png(60) is None


@pytest.mark.parametrize("has_picture", [True, False])
def test_the_run_of_a_tokenizer_has_a_page_of_its_own(tmp_path, has_picture):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.toml").write_text("[autoencoder]\nchannels = 8\n")
    (folder / METRICS_FILE).write_text('{"step": 1, "images": 8, "loss": 0.5}\n{"step": 2, "images": 16, "loss"')
    if has_picture:
        (folder / "reconstructions").mkdir()
        Image.new("RGB", (64, 32)).save(folder / "reconstructions/step_00000001.png")
    view = RunWatch(folder).look()
    assert view.problem == "" and view.summary == "1 steps, 8 images" and len(view.panels) == 1
    assert Image.open(io.BytesIO(view.panels[0].png)).width > 1000
