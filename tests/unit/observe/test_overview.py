"""The page of a run: drawn from whatever a run left behind, with everything on it."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bitdance_scale.config.schema import SampleSection
from bitdance_scale.errors import DataError
from bitdance_scale.observe import overview as page
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, Evaluation, StepMetrics, append_evaluation
from bitdance_scale.observe.run_record import read_run
from bitdance_scale.observe.sample_grids import write_samples, write_start
from tests.unit.observe.test_metrics import point

TITLES = [
    "Flow loss, training", "Text loss, training and held out", "Held-out flow loss by size (px)",
    "Held-out flow loss by flow time", "Gradient norm before clipping", "Learning rate", "Images per second, all ranks",
    "Tokens per second, all ranks", "MFU", "Waiting for data", "Memory, fullest rank", "Images seen by size (px)",
]  # fmt: skip


def write_run(folder: Path, metrics: list[StepMetrics], evaluations: list[Evaluation] | None = None) -> Path:
    folder.mkdir()
    (folder / METRICS_FILE).write_text("".join(line.to_json() + "\n" for line in metrics))
    for line in evaluations or []:
        append_evaluation(folder, line)
    return folder


def held_out(step: int, loss: float = 0.5) -> Evaluation:
    return Evaluation(step, loss, {256: loss, 512: 1.1 * loss}, (0.9 * loss, loss, 1.2 * loss), 2.0)


def full_run(folder: Path) -> Path:
    """Two hundred steps of everything, clipped at first, one of them skipped."""
    metrics = [
        point(
            step,
            mfu=0.4,
            grad_norm=math.nan if step == 90 else 50 / step,
            skipped_steps=int(step >= 90),
            skipped_samples=3,
        )
        for step in range(1, 201)
    ]
    write_run(folder, metrics, [held_out(0, 48.0), *(held_out(step) for step in range(40, 201, 40))])
    (folder / "config.toml").write_text("[optim]\nclip_norm = 1.0\n")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Draws, warnings being errors; returns the figure, which the PNG alone would not show."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(page, "Figure", Kept)

    def draw(folders: list[Path], **options: bool) -> Figure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            png = page.overview([read_run(folder) for folder in folders], **options)
        picture = Image.open(io.BytesIO(png))
        assert picture.size == (2040, 1260) and np.asarray(picture.convert("L")).std() > 5
        return figures[-1]

    return draw


def texts(figure: Figure) -> dict[str, list[str]]:
    """The text inside each panel, by its title."""
    legends = {axes: axes.get_legend() for axes in figure.axes}
    return {
        axes.get_title(loc="left"): [text.get_text() for text in axes.texts]
        + [text.get_text() for text in (legends[axes].get_texts() if legends[axes] else [])]
        for axes in figure.axes
    }


def test_everything_is_on_the_page(tmp_path, drawn):
    figure = drawn([full_run(tmp_path / "demo")])
    inside = texts(figure)
    assert list(inside) == TITLES
    assert inside["Images seen by size (px)"] == ["3 could not be read", "256", "512"]
    assert figure.get_suptitle() == "demo: 200 steps, 1,600 images, 900 tokens, 0:01:40 of training"
    assert inside["Held-out flow loss by size (px)"] == ["256", "512"]
    assert inside["Held-out flow loss by flow time"] == ["0\N{EN DASH}0.33", "0.33\N{EN DASH}0.67", "0.67\N{EN DASH}1"]
    # Of 200 norms 50 / step the first 49 are above 1.
    assert inside["Gradient norm before clipping"] == ["limit 1", "clipped (24.5% of steps)", "skipped (not finite)"]
    panels = dict(zip(TITLES, figure.axes, strict=True))
    (skipped,) = [line for line in panels["Gradient norm before clipping"].lines if line.get_marker() == "x"]
    assert skipped.get_xdata().tolist() == [90]
    assert panels["Gradient norm before clipping"].get_yscale() == "log"
    assert panels["MFU"].get_title(loc="right") == "40.0 %"
    assert panels["Waiting for data"].get_title(loc="right") == "2.0 %"
    # The untrained model's loss does not press the others together.
    assert panels["Held-out flow loss by size (px)"].get_ylim()[1] < 1
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert all(axes.get_xlabel() == "optimiser step" for axes in figure.axes[-4:])


def test_the_newest_pictures_of_a_run_with_a_start_are_below_the_panels(tmp_path):
    folder = full_run(tmp_path / "demo")
    section = SampleSection(prompts=("a red circle",), size_px=(8, 8))
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    write_samples(folder, 50, [red], section)
    assert read_run(folder).pictures is None, "no pictures of the start to compare with"
    write_start(folder, [red], section)
    grid = Image.open(write_samples(folder, 100, [red], section))
    run = read_run(folder)
    assert run.pictures == folder / "samples" / "step_000100.png"
    picture = Image.open(io.BytesIO(page.overview([run]))).convert("RGB")
    assert picture.size[0] == 2040 and picture.size[1] >= 1260 + grid.size[1]
    is_red = (np.asarray(picture)[-grid.size[1] :] == (255, 0, 0)).all(axis=-1)
    assert is_red.sum() == 2 * 256 * 256, "the picture and the start's, each of 256 px"
    two = page.overview([run, dataclasses.replace(run, name="other")])
    assert Image.open(io.BytesIO(two)).size == (2040, 1260)
    assert len(page.panel_pictures([run])) == len(page.panel_pictures([dataclasses.replace(run, pictures=None)]))


@pytest.mark.parametrize("num_runs", [1, 5])
def test_no_text_lies_on_another(tmp_path, drawn, num_runs):
    figure = drawn([full_run(tmp_path / f"run_{number}") for number in range(num_runs)])
    renderer = figure.canvas.get_renderer()
    shown = figure.legends[0].get_texts() if figure.legends else [figure._suptitle]
    for axes in figure.axes:
        shown += [axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
        shown += axes.get_legend().get_texts() if axes.get_legend() else []
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown if text.get_text()]
    panels = [("a panel", axes.bbox) for axes in figure.axes]
    for number, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= 2040 and 0 <= box.y0 < box.y1 <= 1260, text
        assert [other for other, where in [*boxes[number + 1 :], *panels] if box.overlaps(where)] == [], text


@pytest.mark.parametrize("metrics", [[], [point(1)], [point(1, loss_vision=math.nan, loss_text=0.0)]])
def test_a_run_that_has_only_begun_is_drawn(tmp_path, drawn, metrics):
    figure = drawn([write_run(tmp_path / "demo", metrics)])
    inside = texts(figure)
    assert inside["Held-out flow loss by size (px)"] == ["no evaluation"]
    assert inside["Time of a step"][-1] == "MFU: the device's peak is not known"
    assert ("none yet" in inside["Flow loss, training"]) == (not metrics)


def test_a_run_with_nothing_but_the_evaluation_before_it_is_drawn(tmp_path, drawn):
    drawn([write_run(tmp_path / "demo", [], [held_out(0)])])


def test_a_killed_run_is_read_up_to_its_torn_lines(tmp_path):
    folder = full_run(tmp_path / "demo")
    for name in (METRICS_FILE, EVALUATION_FILE):
        content = (folder / name).read_text()
        (folder / name).write_text(content[:-20])
    run = read_run(folder)
    assert run.metrics[-1].step == 199 and run.evaluations[-1].step == 160


def test_work_that_was_lost_is_not_drawn(tmp_path):
    steps = [*range(1, 8), *range(5, 7)]
    metrics = [point(step, loss=float(number)) for number, step in enumerate(steps)]
    run = read_run(write_run(tmp_path / "demo", metrics))
    assert [(line.step, line.loss) for line in run.metrics] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 7), (6, 8)]


def test_time_is_that_of_all_steps_also_of_those_between_lines(tmp_path):
    run = read_run(write_run(tmp_path / "demo", [point(10, step_s=2.0), point(30, step_s=1.0)]))
    assert run.trained_s == 40.0


def test_damage_is_an_error_and_a_missing_run_too(tmp_path):
    folder = write_run(tmp_path / "demo", [point(1)])
    (folder / METRICS_FILE).write_text('{"step": 1}\n' + point(2).to_json() + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_run(folder)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "absent")


def test_stages_lie_one_after_another(tmp_path, drawn):
    stages = [write_run(tmp_path / name, [point(s) for s in range(1, 51)], [held_out(50)]) for name in ("pt", "ct")]
    figure = drawn(stages, one_after_another=True)
    assert figure.get_suptitle().splitlines()[1].startswith("from step 50 on, ct: 50 steps")
    rate = figure.axes[TITLES.index("Learning rate")]
    assert rate.lines[0].get_xdata().tolist() == list(range(1, 51))
    assert rate.lines[1].get_xdata().tolist() == list(range(51, 101))
    assert rate.lines[2].get_xdata() == [50, 50]


def test_runs_over_each_other_have_a_colour_each(tmp_path, drawn):
    figure = drawn([full_run(tmp_path / "first"), full_run(tmp_path / "second")])
    rate = figure.axes[TITLES.index("Learning rate")]
    assert len({line.get_color() for line in rate.lines}) == 2
    assert np.array_equal(rate.lines[0].get_xdata(), rate.lines[1].get_xdata())
    (legend,) = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["first", "second"]


def test_the_panels_are_cut_out_of_the_page(tmp_path):
    run = read_run(write_run(tmp_path / "demo", [point(step) for step in range(1, 30)]))
    page_px = np.asarray(Image.open(io.BytesIO(page.overview([run]))).convert("RGB"))
    panels = page.panel_pictures([run])
    assert len(panels) == 12 and panels[0].title == "Flow loss, training" and panels[5].title == "Learning rate"
    for panel in panels:
        height, width = panel.pixels.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(page_px[:, :, 0], (height, width))
        # The corner alone, then all of it: every place of the page would be a gigabyte of comparisons.
        rows, columns = np.nonzero((windows[:, :, height // 2, ::7] == panel.pixels[height // 2, ::7, 0]).all(-1))
        assert any(
            (page_px[y : y + height, x : x + width] == panel.pixels).all() for y, x in zip(rows, columns, strict=True)
        ), panel.title
        # Nothing of a neighbour is on its edges.
        assert (panel.pixels[:, -1] == 255).all() and (panel.pixels[0] == 255).all(), panel.title
