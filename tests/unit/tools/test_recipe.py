"""The recipe: which configurations make one, what is scored, and its report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import recipe
import score_scenes
from recipe import Job, Recipe, plan_jobs, sides_of
from recipe_report import ScoredModel, StageReport, write_report

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.demo.scenes import render
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes, choose_scenes
from bitdance_scale.observe.metrics import METRICS_FILE, Evaluation, StepMetrics, append_evaluation
from tests.released import write_published

DEMO = [CONFIGS / f"{name}.toml" for name in ("demo", "ct_demo", "sft_demo", "distill_demo")]
EVIDENCE = Path(__file__).parents[3] / "docs" / "results" / "demo_cpu"


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


def score(folder: Path, num_right: int, **settings: object) -> Path:
    """A score of 12 pictures, the last of which are of other scenes."""
    scenes = choose_scenes(2)
    shown = scenes[:num_right] + scenes[:1] * (12 - num_right)
    scored = score_scenes.score_pictures(DemoScenes(per_category=2).read(None), (render(scene) for scene in shown))
    usual = {"size": "64x64", "per_category": 2, "real": False, "steps": 25, "guidance": 3.0}
    score_scenes.write_results(folder, scored, usual | settings, keeps_pictures=False)
    return folder


def test_the_demo_configurations_make_a_recipe(tmp_path: Path) -> None:
    found = Recipe(DEMO, tmp_path, 2)
    assert [config.run.stage for config in found.configs] == ["pt", "ct", "sft", "distill"]
    assert [sides_of(config) for config in found.configs] == [[64, 128], [64, 128], [64, 128], [128]]


def test_the_configurations_of_the_evidence_make_one_after_the_demo(tmp_path: Path) -> None:
    found = Recipe([DEMO[0], *(EVIDENCE / f"{name}.toml" for name in ("ct", "sft", "distill"))], tmp_path, 2)
    assert [(config.run.stage, config.vision.block_side) for config in found.configs] == [
        ("pt", 4),
        ("ct", 4),
        ("sft", 4),
        ("distill", 8),
    ]
    for config in found.configs:
        check(config, 2)


def test_a_stage_must_start_from_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sft_demo.toml: run.start_from = 'runs/ct_demo': must be 'runs/demo'"):
        Recipe([DEMO[0], DEMO[2]], tmp_path, 2)


def test_jobs_cover_stages_limits_and_sweeps_once() -> None:
    sides = {"sft": [64, 128], "distill": [128]}
    jobs = plan_jobs(["sft", "distill"], sides, 10, None)
    # The tokenizer's limit is taken with the first stage, whose blocks are the smallest.
    assert [(job.stage, job.name) for job in jobs] == [
        ("sft", "64px_25steps_guidance3"),
        ("sft", "128px_25steps_guidance3"),
        ("distill", "128px_25steps_guidance3"),
        ("sft", "real_64px"),
        ("sft", "real_128px"),
    ]
    thorough = plan_jobs(["sft", "distill"], sides, 10, 4)
    assert len({(job.stage, job.name) for job in thorough}) == len(thorough) == 5 + 2 * (2 + 4)
    assert thorough[:5] == jobs
    assert Job("distill", 128, 4, steps=10) in thorough and Job("sft", 64, 4, guidance=7.5) in thorough
    # What is a score anyway is not made again with fewer pictures.
    assert Job("sft", 64, 10) in thorough and Job("sft", 64, 4) not in thorough


def a_report(folder: Path, scores: Sequence[ScoredModel]) -> Path:
    """The page of a run with evaluations and one without."""
    stages = [
        StageReport("pt", write_run(folder / "a", evaluates=True), load_config(DEMO[0])),
        StageReport("ct", write_run(folder / "b", evaluates=False), load_config(DEMO[1])),
    ]
    return write_report(folder / "report.html", stages, scores, {"a": 80.0, "b": 20.0, "scores": 90.0}, "make all")


def test_the_report_holds_everything(tmp_path: Path) -> None:
    scores = [
        ScoredModel("pt", score(tmp_path / "s1", 6)),
        ScoredModel("ct", score(tmp_path / "s2", 12)),
        ScoredModel("ct", score(tmp_path / "s3", 12, real=True)),
    ]
    page = (path := a_report(tmp_path, scores)).read_text()
    # Nothing is fetched from elsewhere.
    assert not re.search(r'(src|href)="(?!data:)', page)
    # Two sheets of curves and the scored pictures of two stages; a figure of the scores.
    assert page.count("data:image/webp;base64,") == 4 and page.count("data:image/png;base64,") == 1
    tables = json.loads(path.with_suffix(".json").read_text())
    assert [(row["model"], row["px"], row["overall"]) for row in tables["scores"]] == [
        ("PT", 64, 0.5),
        ("CT", 64, 1.0),
        ("real scenes", 64, 1.0),
    ]
    # Of two prompts a category, each is also judged by the other's picture.
    assert re.search(r"By chance.*<tr><td>PT</td><td>64</td>(<td>0\.\d+</td>){6}</tr>", page, re.DOTALL)
    low, high = tables["scores"][0]["interval"]
    assert low < 0.5 < high and "Drawn with 25 sampling steps a block and guidance 3." in page
    first, second = tables["stages"]
    assert (first["stage"], first["steps"], first["images"], first["after"]) == ("PT", 40, 400, 0.25)
    assert second["stage"] == "CT" and "after" not in second
    # The same prompts: half of them are right for the second stage alone.
    assert re.search(r"CT minus PT at 64 px: \+0\.500 \[\+0\.\d+, \+\d\.\d+\], paired, over 12 prompts", page)
    assert "command: make all" in page and re.search("processor: .*, [0-9]+ cores", page)
    # 40 steps of half a second, of 80 seconds.
    assert "<tr><td>PT</td><td>0.3</td><td>1</td></tr>" in page
    # Settings of pretraining that are no defaults, and what the next stage changes.
    assert "<tr><td>optim.lr</td><td>0.0001</td><td>0.003</td><td>0.002</td></tr>" in page
    assert "<tr><td>sample.guidance</td><td>7.5</td><td>3.0</td><td></td></tr>" in page
    assert "optim.eps" not in page


def test_the_report_shows_sweeps_apart(tmp_path: Path) -> None:
    scores = [ScoredModel("ct", score(tmp_path / "s0", 12))]
    scores += [
        ScoredModel("ct", score(tmp_path / f"s{number}", 6, steps=steps, guidance=guidance), is_sweep=True)
        for number, (steps, guidance) in enumerate(((10, 3.0), (50, 3.0), (25, 1.0)), 1)
    ]
    scores.append(ScoredModel("pt", score(tmp_path / "same", 12)))
    page = a_report(tmp_path, scores).read_text()
    assert "CT minus PT at 64 px: none on any of 12 prompts." in page
    assert page.count("data:image/png;base64,") == 3 and "overall score over guidance scale" in page
    before, after = page.split("Sampling steps and guidance")
    assert before.count("<td>CT</td>") == 1 + 1 + 1 and "<tr><td>CT</td><td>64</td><td>10</td><td>3</td>" in after


def test_scores_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Job] = []

    def score_side_by_side(tasks: Sequence[tuple[Job, Path]]) -> None:
        for job, folder in tasks:
            made.append(job)
            score(folder / job.name, 12, real=job.real, per_category=job.per_category)

    monkeypatch.setattr(recipe, "score_side_by_side", score_side_by_side)
    tool = Recipe(DEMO[:1], tmp_path, 2)
    jobs = [Job("pt", 64, 2, real=True), Job("pt", 64, 2), Job("pt", 128, 2)]
    tool.score(jobs)
    tool.score(jobs)
    assert made == [jobs[2], jobs[1], jobs[0]], "the longest first, and each once"
    assert json.loads((tmp_path / "times.json").read_text()).keys() == {"scores"}
    tool.score([Job("pt", 64, 3)])
    assert made[3:] == [Job("pt", 64, 3)]
    # Scores of earlier versions do not say what chance would be.
    file = tmp_path / "pt" / jobs[2].name / "score.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "by_chance"})
    )
    tool.score(jobs[2:])
    assert made[4:] == jobs[2:]


def test_a_score_is_made_in_another_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_published(tmp_path / "pt" / "published")
    job = Job("pt", 32, 1, steps=1, guidance=1.0)
    recipe.score_side_by_side([(job, tmp_path / "pt")])
    found = json.loads((tmp_path / "pt" / job.name / "score.json").read_text())
    assert found["num_pictures"] == 6
    assert found["settings"] == {
        "size": "32x32",
        "per_category": 1,
        "real": False,
        "steps": 1,
        "guidance": 1.0,
        "seed": 0,
    }
    assert (tmp_path / "pt" / job.name / "grid.png").is_file() and "overall" in capfd.readouterr().out


def test_a_stage_that_fails_ends_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BitDanceError, match="exit status 3 of: "):
        recipe._run(["bash", "-c", "exit 3"])
    assert recipe.main(["no.toml", "--out", str(tmp_path)]) == 2
    assert "no.toml: cannot read" in capsys.readouterr().err
