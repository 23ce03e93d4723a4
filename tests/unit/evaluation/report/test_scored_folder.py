"""What of the folders of a report is refused, before anything is computed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from bitdance_scale.errors import BitDanceError, ConfigError, DataError
from bitdance_scale.evaluation.benchmarks.manifest import read_drawing
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.score_file import scores_path
from bitdance_scale.evaluation.report.scored_folder import parse_folder, read_folders
from tests.unit.evaluation.report.scored_drawings import (
    edit_json,
    score,
    score_clip,
    write_drawing,
)


def read(*roots: Path, metrics: tuple[str, ...] = ()):
    return read_folders([parse_folder(str(root)) for root in roots], metrics)


def test_names_are_those_of_the_folders_or_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "a=b"):
        (tmp_path / name).mkdir()
    assert parse_folder("plain") == ("plain", Path("plain"))
    assert parse_folder("./plain/") == ("plain", Path("plain"))
    assert parse_folder("mine=plain") == ("mine", Path("plain"))
    # A folder that is there is no name and folder.
    assert parse_folder("a=b") == ("a=b", Path("a=b"))
    with pytest.raises(ConfigError, match="absent: no such folder"):
        parse_folder("mine=absent")
    with pytest.raises(ConfigError, match="=plain: has no name before '='"):
        parse_folder("=plain")


def test_scores_of_a_folder_are_read(tmp_path):
    root = score_clip(score(write_drawing(tmp_path / "a")), 28.0)
    (found,) = read(root)
    assert (found.name, found.benchmark, found.has_manifest) == ("a", "demo-scenes", True)
    assert [*found.scores] == ["clip-score", "scenes"]
    assert found.drawing["settings.steps"] == 25 and found.drawing["model.block_tokens"] == 16
    (found,) = read(root, metrics=("scenes",))
    assert [*found.scores] == ["scenes"]


def test_folders_without_the_scores_are_refused_with_the_command_that_makes_them(tmp_path):
    root = write_drawing(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"{root}: holds no scores .* `bitdance evaluate score {root}` makes them"):
        read(root)
    score(root)
    with pytest.raises(ConfigError, match="has scores of scenes, and none of geneval, dpg; make them with"):
        read(root, metrics=("geneval", "dpg"))
    with pytest.raises(ConfigError, match="metric = 'fid': must be one of geneval"):
        read(root, metrics=("fid",))


def test_scores_of_another_drawing_are_refused(tmp_path):
    root = score_clip(score(write_drawing(tmp_path / "a")), 28.0)
    manifest = read_drawing(root)
    score(root, drawing=manifest | {"seed": 5})
    with pytest.raises(
        ConfigError, match="a: the scores of scenes are of another drawing .* seed was 5 and is 0; score"
    ):
        read(root)
    assert [*read(root, metrics=("clip-score",))[0].scores] == ["clip-score"]
    # Nor does a drawing.json that is gone make two drawings one.
    (root / "drawing.json").unlink()
    with pytest.raises(ConfigError, match="of another drawing than the one there: seed was 5 and is 0"):
        read(root)
    edit_json(scores_path(root, "scenes"), drawing=manifest)
    assert not read(root)[0].has_manifest


def test_two_folders_of_a_name_are_refused_in_one_benchmark_alone(tmp_path):
    roots = [score(write_drawing(tmp_path / place / "same")) for place in ("first", "second")]
    with pytest.raises(ConfigError, match=f"both called 'same' .* name them apart, as in first={roots[0]}"):
        read(*roots)
    edit_json(scores_path(roots[1], "scenes"), benchmark="dpg")
    assert [(one.name, one.benchmark) for one in read(*roots)] == [("same", "demo-scenes"), ("same", "dpg")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "geneval"}, "holds scores of 'geneval'"),
        ({"benchmark": "unheard"}, "another version of this program"),
        ({"images": (ImageScore("9", 0, "colors", 1.0, {}),)}, "prompt '9', which is not among its prompts"),
        ({"images": (ImageScore("00000", 0, "colors", float("nan"), {}),)}, "a value that is no number"),
        ({"images": (ImageScore("00000", 0, "colors", 1.0, {"colors": (1.0, "x")}),)}, "a value that is no number"),
        ({"images": (), "figures": {"FID": None}}, "FID = None is no number"),
        ({"images": ()}, "holds no value"),
        ({"scorer": []}, "scorer is no object"),
    ],
)
def test_damaged_scores_are_refused_by_file(tmp_path, changes, says):
    root = score(write_drawing(tmp_path / "a"))
    if "images" in changes:
        changes = changes | {"images": [asdict(image) for image in changes["images"]]}
    edit_json(scores_path(root, "scenes"), **changes)
    with pytest.raises(DataError, match=f"scenes.json: .*{says}"):
        read(root)


def test_files_of_two_benchmarks_in_a_folder_are_refused(tmp_path):
    root = score_clip(score(write_drawing(tmp_path / "a")), 28.0)
    edit_json(scores_path(root, "clip-score"), benchmark="dpg")
    with pytest.raises(DataError, match="files are of different benchmarks, 'demo-scenes' and 'dpg'"):
        read(root)


def test_a_file_of_no_metric_is_refused(tmp_path):
    root = score(write_drawing(tmp_path / "a"))
    scores_path(root, "scenes").rename(scores_path(root, "beauty"))
    edit_json(scores_path(root, "beauty"), metric="beauty")
    with pytest.raises(BitDanceError, match="beauty.json: metric = 'beauty': must be one of"):
        read(root)
