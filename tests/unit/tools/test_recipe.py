"""The recipe: which configurations make one, what is scored, and its report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import recipe
import score_scenes
from recipe import Job, Recipe, plan_jobs, sides_of
from recipe_report import ScoredModel, StageReport, write_report

from bitdance_scale.config.load import load_config
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.demo.scenes import render
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes, choose_scenes
from bitdance_scale.observe.metrics import METRICS_FILE, Evaluation, StepMetrics, append_evaluation

DEMO = [CONFIGS / f"{name}.toml" for name in ("demo", "ct_demo", "sft_demo", "distill_demo")]


def a_step(step: int, loss: float) -> StepMetrics:
    return StepMetrics(
        step=step,
        images=10 * step,
        tokens=3000 * step,
        loss=loss,
        loss_vision=loss,
        loss_text=1.0,
        grad_norm=0.5,
        lr=1e-3,
        step_s=0.5,
        data_wait_s=0.0,
        tokens_per_s=6e3,
        images_per_s=20.0,
        mfu=None,
        images_by_resolution={64: 10 * step},
        padding_share=0.0,
        memory_bytes=1,
    )


def write_run(folder: Path, evaluates: bool) -> Path:
    folder.mkdir(parents=True)
    steps = [a_step(step, 2 / step) for step in range(1, 41)]
    (folder / METRICS_FILE).write_text("".join(point.to_json() + "\n" for point in steps))
    if evaluates:
        for step, loss in ((0, 40.0), (40, 0.25)):
            append_evaluation(folder, Evaluation(step, loss, {64: loss, 128: loss / 2}, [loss] * 5, 0.75))
    return folder


def score(folder: Path, num_right: int) -> Path:
    """A score of 12 pictures, the last of which are of other scenes."""
    scenes = choose_scenes(2)
    shown = scenes[:num_right] + scenes[:1] * (12 - num_right)
    scored = score_scenes.score_pictures(DemoScenes(per_category=2).read(None), (render(scene) for scene in shown))
    score_scenes.write_results(folder, scored, {"per_category": 2}, keeps_pictures=False)
    return folder


def test_the_demo_configurations_make_a_recipe(tmp_path: Path) -> None:
    found = Recipe(DEMO, tmp_path, 2)
    assert [config.run.stage for config in found.configs] == ["pt", "ct", "sft", "distill"]
    assert [sides_of(config) for config in found.configs] == [[64, 128], [64, 128], [64, 128], [128]]


def test_a_stage_must_start_from_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sft_demo.toml: run.start_from = 'runs/ct_demo': must be 'runs/demo'"):
        Recipe([DEMO[0], DEMO[2]], tmp_path, 2)


def test_jobs_cover_stages_limits_and_sweeps_once() -> None:
    sides = {"sft": [64, 128], "distill": [128]}
    jobs = plan_jobs(["sft", "distill"], sides, 10, None)
    assert [(job.stage, job.name) for job in jobs] == [
        ("sft", "64px_25steps_guidance3"),
        ("sft", "128px_25steps_guidance3"),
        ("distill", "128px_25steps_guidance3"),
        ("distill", "real_64px"),
        ("distill", "real_128px"),
    ]
    thorough = plan_jobs(["sft", "distill"], sides, 10, 4)
    assert len({(job.stage, job.name) for job in thorough}) == len(thorough) == 5 + 2 * (2 + 4)
    assert thorough[:5] == jobs
    assert Job("distill", 128, 4, steps=10) in thorough and Job("sft", 64, 4, guidance=7.5) in thorough
    # What is a score anyway is not made again with fewer pictures.
    assert Job("sft", 64, 10) in thorough and Job("sft", 64, 4) not in thorough


def test_the_report_holds_everything(tmp_path: Path) -> None:
    stages = [
        StageReport("pt", "pretraining", write_run(tmp_path / "a", evaluates=True), load_config(DEMO[0])),
        StageReport("ct", "continued training", write_run(tmp_path / "b", evaluates=False), load_config(DEMO[1])),
    ]
    scores = [
        ScoredModel("pt", "64px_25steps_guidance3", score(tmp_path / "s1", 6)),
        ScoredModel("ct", "64px_25steps_guidance3", score(tmp_path / "s2", 12)),
    ]
    path = write_report(tmp_path / "report.html", stages, scores)
    page = path.read_text()
    # Nothing is fetched from elsewhere.
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/webp;base64,") == 3
    tables = json.loads(path.with_suffix(".json").read_text())
    assert [row["overall"] for row in tables["scores"]] == [0.5, 1.0]
    first, second = tables["stages"]
    assert (
        first["steps"] == 40 and first["images"] == 400 and first["held out after"] == 0.25 and first["64 px"] == 0.25
    )
    assert first["flow loss"] == pytest.approx((2 / 39 + 2 / 40) / 2, abs=1e-4)
    assert "held out after" not in second


def test_scores_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], folder: Path | None = None) -> None:
        calls.append(command)
        score(Path(command[command.index("--out") + 1]), 12)

    monkeypatch.setattr(recipe, "_run", run)
    (tmp_path / "pt").mkdir()
    made = Recipe(DEMO[:1], tmp_path, 2)
    jobs = [Job("pt", 64, 2), Job("pt", 64, 2, real=True)]
    made.score(jobs)
    made.score(jobs)
    assert len(calls) == 2 and sum("--real" in command for command in calls) == 1
    assert (tmp_path / "pt" / jobs[0].name / "score.json").is_file()
    made.score([Job("pt", 64, 3)])
    assert len(calls) == 3


def test_a_stage_that_fails_ends_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BitDanceError, match="exit status 3 of: "):
        recipe._run(["bash", "-c", "exit 3"])
    assert recipe.main(["no.toml", "--out", str(tmp_path)]) == 2
    assert "no.toml: cannot read" in capsys.readouterr().err
