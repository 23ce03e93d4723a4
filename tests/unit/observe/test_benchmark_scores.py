"""Scores of a run's benchmarks: in their file, and on the page of the run."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.observe import overview as page
from bitdance_scale.observe.benchmark_scores import (
    BENCHMARKS_FILE,
    BenchmarkScores,
    benchmark_panels,
    read_scores_of_run,
)
from bitdance_scale.observe.metric_sink import panel_values
from bitdance_scale.observe.metrics import METRICS_FILE, append_record
from bitdance_scale.observe.run_record import read_run
from tests.unit.observe.test_metrics import point


def scores(step: int, value: float = 0.5, benchmark: str = "demo-scenes", metric: str = "scenes") -> BenchmarkScores:
    values = {"overall": value, "colors": value / 2}
    return BenchmarkScores(step, benchmark, metric, values, {"overall": value - 0.1}, {"overall": value + 0.1}, 8, 2.5)


def append(folder: Path, *lines: BenchmarkScores) -> None:
    for line in lines:
        append_record(folder / BENCHMARKS_FILE, line)


def test_a_step_has_a_line_for_each_benchmark_and_metric_once(tmp_path: Path) -> None:
    assert read_scores_of_run(tmp_path) == []
    append(tmp_path, scores(10), scores(10, metric="clip-score"), scores(10, benchmark="b"), scores(20))
    # The run goes on from before step 10, and scores again.
    append(tmp_path, scores(10, 0.7))
    assert read_scores_of_run(tmp_path) == [scores(10, metric="clip-score"), scores(10, benchmark="b"), scores(10, 0.7)]
    (tmp_path / BENCHMARKS_FILE).write_text('{"step": 1}\n' + scores(2).to_json())
    with pytest.raises(DataError, match="benchmarks.jsonl, line 1: .*scores of a benchmark of one step"):
        read_scores_of_run(tmp_path)


def test_names_in_wandb_have_benchmark_metric_and_value() -> None:
    line = scores(10, metric="clip-score")
    assert panel_values(line, benchmark_panels(line)) == pytest.approx(
        {
            "progress/step": 10,
            "benchmark/demo_scenes/clip_score/overall": 0.5,
            "benchmark/demo_scenes/clip_score/colors": 0.25,
            "benchmark/demo_scenes/clip_score/overall_low": 0.4,
            "benchmark/demo_scenes/clip_score/overall_high": 0.6,
            "benchmark/demo_scenes/seconds": 2.5,
        }
    )
    assert line.summary() == (
        "demo-scenes after step 10: clip-score 0.5 (0.4 to 0.6; colors 0.25), 8 images in 2.5 s"
    )  # fmt: skip


@pytest.mark.parametrize("num_runs", [1, 2])
def test_the_page_has_a_panel_for_each_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_runs: int) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(page, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    folders = [tmp_path / f"run_{number}" for number in range(num_runs)]
    for folder in folders:
        folder.mkdir()
        (folder / METRICS_FILE).write_text("".join(point(step).to_json() + "\n" for step in range(1, 41)))
        append(folder, *(scores(step, step / 100) for step in (10, 20, 40)), scores(40, 0.0, metric="clip-score"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = Image.open(io.BytesIO(page.overview([read_run(folder) for folder in folders])))
    assert picture.size == (2040, 1680)
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert len(panels) == len(figures[0].axes) == 14
    scenes = panels["demo-scenes: scenes"]
    assert [line.get_ydata().tolist() for line in scenes.lines] == [[0.1, 0.2, 0.4]] * num_runs
    assert len(scenes.collections) == num_runs and scenes.get_ylim()[1] > 0.5
    assert scenes.get_title(loc="right") == ("0.4" if num_runs == 1 else "")
    # A score of 0 lies on the lower border.
    assert panels["demo-scenes: clip-score"].get_ylim()[0] <= 0
    assert [bool(axes.get_xlabel()) for axes in figures[0].axes] == [False] * 10 + [True] * 4
