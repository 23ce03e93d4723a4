"""`bitdance evaluate report`: the page and report.json have the values of the metrics; what is refused; W&B offline."""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli.evaluate_report import main
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import Estimate, differences, estimates
from bitdance_scale.evaluation.report import record
from bitdance_scale.evaluation.report.thumbnails import Thumbnails
from tests.unit.evaluation.report.scored_drawings import (
    image_scores,
    picture,
    scene_prompts,
    score,
    score_clip,
    score_set,
    write_drawing,
)
from tests.unit.observe.test_wandb_sink import bare_environment, read_run, values

COMBINE = find_metric("scenes").combine
BEFORE, AFTER = image_scores(0.4, 1), image_scores(0.9, 2)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> dict[str, Path]:
    """Two models, one of which was also drawn with other steps."""
    folder = tmp_path_factory.mktemp("drawn")
    roots = {
        "sft": write_drawing(folder / "sft", name="p4"),
        "distilled": write_drawing(folder / "distilled", name="p8", sha256="b" * 64, block_tokens=64),
        "sft_10": write_drawing(folder / "sft_10", name="p4", steps=10),
    }
    score(roots["sft"], images=BEFORE)
    score(roots["distilled"], images=AFTER)
    score(roots["sft_10"], 0.2, seed=3)
    for number, root in enumerate(roots.values()):
        score_set(root, {"FID": 2.0 + number, "precision": 0.8})
    return roots


def report(out: Path, *arguments: object) -> tuple[str, dict]:
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8"), json.loads((out / "report.json").read_text())


def rows_of(page: str) -> list[list[str]]:
    """The cells of all rows of tables of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def written(estimate: Estimate, sign: str = "") -> str:
    """As the page has a value of a scale of 1."""
    value, low, high = (f"{round(number, 3) + 0.0:{sign}.3f}" for number in vars(estimate).values())
    return f"{value} [{low}, {high}]"


@pytest.fixture(scope="module")
def made(drawings, tmp_path_factory) -> tuple[str, dict]:
    return report(tmp_path_factory.mktemp("report"), *drawings.values(), "--worst", 3)


def test_the_page_and_the_record_have_the_values_of_the_metric(made):
    page, content = made
    first, second = estimates(BEFORE, COMBINE), estimates(AFTER, COMBINE)
    rows = rows_of(page)
    section = content["sections"][0]
    assert (section["benchmark"], section["metric"], section["scale"]) == ("demo-scenes", "scenes", 1)
    for name in first:
        assert any(row[:3] == [name, written(first[name]), written(second[name])] for row in rows), name
        for model, found in (("sft", first), ("distilled", second)):
            value = section["results"][model]["values"][name]
            assert {key: value[key] for key in ("value", "low", "high")} == vars(found[name])
    assert section["results"]["sft"]["values"]["overall"]["num_prompts"] == 18
    assert section["results"]["sft"]["notes"] == ["a note of the scorer"] and "a note of the scorer" in page


def test_the_page_and_the_record_have_the_paired_differences(made):
    page, content = made
    expected = differences(BEFORE, AFTER, COMBINE)
    rows = rows_of(page)
    (pair, _) = content["sections"][0]["pairs"]
    assert (pair["baseline"], pair["model"], pair["is_paired"], pair["reasons"]) == ("sft", "distilled", True, [])
    for name, found in expected.items():
        text = written(found.estimate, "+") + (" clear" if found.is_clear else "")
        assert any(row[:2] == [name, text] for row in rows), name
        kept = pair["differences"][name]
        assert {key: kept[key] for key in ("value", "low", "high")} == vars(found.estimate)
        assert (kept["is_clear"], kept["num_better"], kept["num_worse"], kept["num_prompts"]) == (
            found.is_clear, found.num_better, found.num_worse, found.num_prompts
        )  # fmt: skip
    counts = expected["overall"]
    assert counts.is_clear
    assert any(row[:2] == ["prompts better", str(counts.num_better)] for row in rows)
    assert any(row[:2] == ["prompts worse", str(counts.num_worse)] for row in rows)


def test_settings_figures_and_the_tokens_at_once_are_shown(made):
    page, content = made
    rows = rows_of(page)
    assert ["drawing", "tokens at once", "Demo scenes"] in rows
    assert ["distilled", "64 (p = 8)", written(estimates(AFTER, COMBINE)["overall"])] in rows
    header = next(row for row in rows if row[:2] == ["drawing", "folder"])
    assert header[2:] == ["name in paths", "tokens at once", "weights (SHA-256)", "steps"]
    assert next(row for row in rows if row[0] == "sft_10" and len(row) == 6)[2:] == ["p4", "16 (p = 4)", "a" * 12, "10"]
    assert "guidance 3.0" in page and "seed 0" in page
    assert ["FID", "2.00", "3.00", "4.00"] in rows and ["precision", "0.8000", "0.8000", "0.8000"] in rows
    assert content["sections"][1]["results"]["distilled"]["figures"] == {"FID": 3.0, "precision": 0.8}
    assert content["drawings"][1]["settings"]["model.block_tokens"] == 64


def test_the_sweep_is_on_the_page_and_in_the_record(made):
    page, content = made
    (sweep,) = content["sweeps"]
    assert sweep["setting"] == "settings.steps" and "Over steps" in page
    assert sweep["lines"][0]["drawings"] == [{"position": 10, "name": "sft_10"}, {"position": 25, "name": "sft"}]
    assert [*sweep["panels"]] == ["Demo scenes", "FID", "precision"]
    point = sweep["panels"]["Demo scenes"][0]["points"][1]
    assert point == {"position": 25} | vars(estimates(BEFORE, COMBINE)["overall"])
    assert sweep["panels"]["FID"][0]["points"][0] == {"position": 10, "value": 4.0, "low": None, "high": None}


def test_the_worst_prompts_are_shown_with_pictures_and_reasons(made):
    page, content = made
    texts = {prompt.id: prompt.text for prompt in scene_prompts()}
    worst = content["sections"][0]["results"]["sft"]["worst"]
    assert len(worst) == 3 and all(texts[one["prompt_id"]] == one["text"] for one in worst)
    for one in worst:
        assert html.escape(f"{one['value']:.3g}: {one['text']} ({one['category']}, {one['prompt_id']})") in page
    assert "0: no red star" in page
    contrasts = content["sections"][0]["pairs"][0]["contrasts"]
    assert len(contrasts) == 3
    # Two images of each: three drawings' worst, and two pairs of drawings.
    num_thumbnails = page.count("<figure>")
    assert num_thumbnails == 2 * (3 * 3 + 2 * sum(len(one["contrasts"]) for one in content["sections"][0]["pairs"]))
    # The values and the sweep, each drawn once for the one metric with intervals.
    assert page.count('class="figure"') == 2
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)


def test_names_baseline_and_metric_are_chosen(drawings, tmp_path):
    arguments = [f"a={drawings['sft']}", f"b={drawings['distilled']}", "--baseline", "b", "--metric", "scenes"]
    _, content = report(tmp_path / "out", *arguments)
    assert [section["metric"] for section in content["sections"]] == ["scenes"]
    (pair,) = content["sections"][0]["pairs"]
    assert (pair["baseline"], pair["model"]) == ("b", "a") and content["sweeps"] == []


def test_drawings_of_one_model_over_benchmarks_share_a_row(drawings, tmp_path):
    other = shutil.copytree(drawings["sft"], tmp_path / "other")
    for path in (other / "scores").iterdir():
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content | {"benchmark": "dpg"}), encoding="utf-8")
    page, content = report(tmp_path / "out", f"sft={drawings['sft']}", f"sft={other}", "--metric", "scenes")
    overall = written(estimates(BEFORE, COMBINE)["overall"])
    assert ["sft", "16 (p = 4)", overall, overall] in rows_of(page)
    assert [section["benchmark"] for section in content["sections"]] == ["demo-scenes", "dpg"]
    assert "there is nothing to compare" in page


def test_what_was_drawn_otherwise_is_not_paired_and_the_page_says_why(drawings, tmp_path):
    other = score(write_drawing(tmp_path / "other", seed=9), images=AFTER)
    page, content = report(tmp_path / "out", drawings["sft"], other, "--metric", "scenes")
    (pair,) = content["sections"][0]["pairs"]
    assert not pair["is_paired"] and pair["differences"] == {} and pair["contrasts"] == []
    assert "other and sft are not paired: other seed: 0 and 9." in page
    assert any(row[0] == "overall" and row[2] == written(estimates(AFTER, COMBINE)["overall"]) for row in rows_of(page))


def test_pictures_that_are_gone_are_named_and_values_stay(drawings, tmp_path):
    root = shutil.copytree(drawings["sft"], tmp_path / "sft")
    for path in root.glob("*.png"):
        path.unlink()
    (root / "drawing.json").unlink()
    page, content = report(tmp_path / "out", root)
    assert "the pictures cannot be shown" in page and "cannot be read as a picture" in page
    assert "sft: its drawing.json is gone" in page
    assert "<figure>" not in page
    assert (
        content["sections"][0]["results"]["sft"]["values"]["overall"]["value"]
        == estimates(BEFORE, COMBINE)["overall"].value
    )


def test_a_page_that_is_full_says_what_is_left_out(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(Thumbnails.__init__, "__defaults__", (5_000,))
    page, _ = report(tmp_path / "out", drawings["sft"], "--worst", 6)
    num_shown = page.count("<figure>")
    assert 0 < num_shown < 12
    assert f"{12 - num_shown} images are left out" in page and "the page has no room for these pictures" in page


def test_text_of_prompts_is_no_html(tmp_path):
    prompts = {prompt.id: "<script>alert(1)</script> & $x" for prompt in scene_prompts()}
    root = score(write_drawing(tmp_path / "a<b"), prompts=prompts)
    page, _ = report(tmp_path / "out", root)
    assert "<script>" not in page and "&lt;script&gt;" in page and "a&lt;b" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], "absent: no such folder"),
        (["{sft}", "--baseline", "other"], "--baseline other: must be one of sft"),
        (["{sft}", "--metric", "beauty"], "metric = 'beauty': must be one of"),
        (["{sft}", "{sft}"], "are both called 'sft'"),
        (["{sft}", "--worst", "0"], "must be a whole number, at least 1"),
        (["{sft}", "--out", "{sft}/drawing.json"], "is no folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(drawings, tmp_path, capsys, arguments, says):
    filled = [text.format(sft=drawings["sft"]) for text in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    assert main(filled) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(200)
def test_tables_are_logged_offline_without_a_network(drawings, tmp_path):
    root = score_clip(shutil.copytree(drawings["sft"], tmp_path / "sft"), 28.0)
    for path in root.glob("00000*.png"):
        path.unlink()
    out = tmp_path / "out"
    # Every connection to a web server would go through this proxy, and so be noticed.
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        command = [sys.executable, "-m", "bitdance_scale.cli", "evaluate", "report", root, drawings["distilled"]]
        done = subprocess.run(
            [*map(str, command), "--out", str(out), "--worst", "18", "--wandb", "quality"],
            env=bare_environment(tmp_path, HTTP_PROXY=address, HTTPS_PROXY=address),
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert "W&B (offline): project quality" in done.stdout
    (folder,) = (out / "wandb").glob("offline-run-*")
    (run,) = folder.glob("run-*.wandb")
    points = [values(one.history.item) for one in read_run(run) if one.WhichOneof("record_type") == "history"]
    paths = {name.removesuffix("/path"): path for point in points for name, path in point.items() if "/path" in name}
    assert [*paths] == ["report/values", "report/differences", "report/worst"]
    tables = {name: json.loads((folder / "files" / path).read_text()) for name, path in paths.items()}

    content = json.loads((out / "report.json").read_text())
    assert tables["report/values"]["columns"] == list(record.VALUE_COLUMNS)
    expected = estimates(BEFORE, COMBINE)["overall"]
    assert ["demo-scenes", "scenes", "overall", "sft", *vars(expected).values(), 18] in tables["report/values"]["data"]
    assert ["demo-scenes", "distribution", "FID", "sft", 2, None, None, None] in tables["report/values"]["data"]
    assert tables["report/differences"]["columns"] == list(record.DIFFERENCE_COLUMNS)
    found = differences(BEFORE, AFTER, COMBINE)["colors"]
    assert [
        "demo-scenes", "scenes", "colors", "distilled", "sft", *vars(found.estimate).values(), found.is_clear,
        found.num_better, found.num_worse, found.num_prompts,
    ] in tables["report/differences"]["data"]  # fmt: skip
    worst = tables["report/worst"]
    assert worst["columns"] == [*record.WORST_COLUMNS, "picture"]
    results = content["sections"][0]["results"]
    assert len(worst["data"]) == 18 * 3 and all(len(results[name]["worst"]) == 18 for name in ("sft", "distilled"))
    by_prompt = {(row[1], row[2], row[3]): row for row in worst["data"]}
    # A picture that is gone leaves its cell empty.
    assert by_prompt["scenes", "sft", "00000"][-1] is None and by_prompt["scenes", "distilled", "00000"][-1] == "Image"
    (uploads,) = (
        {entry.path: Path(entry.local_path) for entry in one.artifact.manifest.contents}
        for one in read_run(run)
        if one.WhichOneof("record_type") == "artifact" and "worst" in one.artifact.name
    )
    assert all(path.is_relative_to(folder) and path.is_file() for path in uploads.values())
    (table,) = (path for name, path in uploads.items() if name.endswith(".table.json"))
    rows = {(row[1], row[2], row[3]): row for row in json.loads(table.read_text())["data"]}
    cell = rows["scenes", "distilled", "00000"][-1]
    assert (cell["width"], cell["height"]) == (64, 32)
    with Image.open(uploads[cell["path"]]) as sheet:
        assert np.array_equal(np.asarray(sheet)[:, :32], picture(0))
