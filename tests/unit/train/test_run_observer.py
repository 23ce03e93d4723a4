"""The page of a run is drawn when there is something new on it, and failing to draw it never ends a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.load import load_config
from bitdance_scale.observe import overview as page
from bitdance_scale.observe.benchmark_scores import read_scores_of_run
from bitdance_scale.observe.metrics import Evaluation
from bitdance_scale.train import run_sinks
from bitdance_scale.train.run_observer import OVERVIEW_FILE, RunObserver, show_result
from bitdance_scale.train.training_benchmark import BenchmarkResult, ShownImage
from tests.unit.observe.test_benchmark_scores import scores
from tests.unit.observe.test_metrics import point

EVALUATION = Evaluation(2, 0.5, {256: 0.4, 512: 0.6}, (0.3, 0.7), 9.0)


class Sink:
    """In W&B's place: keeps the images."""

    images: list[tuple[int, str]]
    sizes: set[tuple[int, int]]

    def __init__(self, *_: object, **__: object) -> None:
        Sink.images, Sink.sizes = [], {(2040, 1260)}

    def log_image(self, step: int, name: str, path: Path, caption: str) -> None:
        assert Image.open(path).size in Sink.sizes and caption == f"step {step}"
        Sink.images.append((step, name))

    def log(self, *_: object) -> None:
        pass

    finish = log


@pytest.fixture
def observe(monkeypatch, tmp_path):
    monkeypatch.setattr(run_sinks, "WandbSink", Sink)
    config = load_config("demo")

    def make(rank: int = 0) -> RunObserver:
        ranks = SimpleNamespace(
            rank=rank, tensor_size=1, pipeline_size=1, data_size=2, world_size=2, device_name="cpu"
        )  # fmt: skip
        return RunObserver(config, ranks, tmp_path, vocab_size=755, resumed_step=0)

    return make


def test_the_page_is_drawn_at_evaluations_and_at_the_end(observe, tmp_path):
    with observe() as observer:
        observer.step(point(1))
        assert not (tmp_path / OVERVIEW_FILE).exists()
        observer.step(point(2))
        observer.evaluation(EVALUATION, 16)
        assert Sink.images == [(2, "overview")]
        observer.step(point(3))
    assert Sink.images == [(2, "overview"), (3, "overview")]
    assert f"overview     {tmp_path / OVERVIEW_FILE}" in show_result(tmp_path)


def test_scores_are_recorded_with_their_pictures_and_drawn(observe, tmp_path, caplog):
    caplog.set_level("INFO")
    shown = [ShownImage(np.zeros((8, 8, 3), np.uint8), "WRONG: a red circle")]
    result = BenchmarkResult([scores(2, 0.25), scores(2, 20.0, metric="clip-score")], shown)
    with observe() as observer:
        observer.step(point(2))
        Sink.sizes = {(2040, 1680), (280, 313)}
        observer.benchmark(result, 16)
    assert [name for _, name in Sink.images] == ["benchmark/demo_scenes", "overview"]
    assert [line.metric for line in read_scores_of_run(tmp_path)] == ["scenes", "clip-score"]
    assert (tmp_path / "benchmarks" / "demo-scenes" / "step_000002.png").exists()
    assert "demo-scenes after step 2: scenes 0.25 (0.15 to 0.35" in caplog.text
    assert "demo-scenes after step 2: clip-score 20" in show_result(tmp_path)


def test_the_page_of_the_last_step_is_drawn_once(observe):
    with observe() as observer:
        observer.step(point(2))
        observer.evaluation(EVALUATION, 16)
    assert Sink.images == [(2, "overview")]


def test_a_run_goes_on_where_the_page_cannot_be_drawn(observe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page, "overview", lambda runs: 1 / 0)
    with observe() as observer:
        observer.step(point(2))
        observer.evaluation(EVALUATION, 16)
        observer.step(point(3))
    assert "overview.png could not be drawn" in caplog.text and Sink.images == []
    assert not (tmp_path / OVERVIEW_FILE).exists()


def test_other_ranks_show_nothing(observe, tmp_path):
    with observe(rank=1) as observer:
        observer.step(point(2))
        observer.evaluation(EVALUATION, 16)
    assert list(tmp_path.iterdir()) == []
