"""`drawing.json`: a folder goes on with its own drawing and with no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.manifest import Drawing, begin_drawing, check_drawing, read_drawing
from tests.unit.evaluation.benchmarks.small_benchmarks import DPG, published, small

SETTINGS = {"steps": 50, "guidance": 7.5}


def drawing(tmp_path: Path, name: str = "dpg") -> Drawing:
    benchmark = small(name)
    prompts = benchmark.read(published(tmp_path / "published", name))
    model = {"name": "ours", "weights": "runs/ours/step_000040"}
    return Drawing.of(benchmark, prompts, model=model, size_px=(1024, 1024), settings=SETTINGS, seed=0)


def test_a_folder_goes_on_with_its_own_drawing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "drawing.json.writing").write_bytes(b"")
    begin_drawing(out, drawing(tmp_path))
    (out / "0.png").write_bytes(b"")
    begin_drawing(out, drawing(tmp_path))
    assert read_drawing(out)["benchmark"] == "dpg" and read_drawing(out)["num_prompts"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"name": "theirs", "weights": "runs/ours/step_000040"}},
            'model.name is "ours" there, "theirs" here',
        ),
        ({"settings": SETTINGS | {"guidance": 13.0}}, "settings.guidance is 7.5 there, 13.0 here. Name another folder"),
        ({"settings": {"steps": 50}}, "settings.guidance is 7.5 there, not set here"),
        ({"settings": SETTINGS | {"sampler": "euler"}}, 'settings.sampler is not set there, "euler" here'),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"size_px": (512, 1024)}, r"size_px is \[1024, 1024\] there, \[512, 1024\] here"),
        ({"images_per_prompt": 1}, "images_per_prompt is 4 there, 1 here"),
        ({"layout_version": 2}, "layout_version is 1 there, 2 here"),
        ({"seed": 1, "size_px": (8, 8)}, "size_px is .* there, .* here; seed is 0 there, 1 here"),
    ],
)
def test_another_drawing_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    begin_drawing(tmp_path / "out", drawing(tmp_path))
    before = (tmp_path / "out/drawing.json").read_bytes()
    with pytest.raises(ConfigError, match=f"out: holds another drawing .drawing.json.: .*{message}"):
        begin_drawing(tmp_path / "out", replace(drawing(tmp_path), **changes))
    assert (tmp_path / "out/drawing.json").read_bytes() == before


def test_the_tokens_at_once_are_compared_where_a_folder_says_them(tmp_path: Path) -> None:
    first = drawing(tmp_path)
    told = replace(first, model={**first.model, "block_tokens": 16})
    begin_drawing(tmp_path / "silent", first)
    check_drawing(tmp_path / "silent", told)
    begin_drawing(tmp_path / "told", told)
    with pytest.raises(ConfigError, match="model.block_tokens is 16 there, 64 here"):
        check_drawing(tmp_path / "told", replace(told, model={**told.model, "block_tokens": 64}))


def test_another_benchmark_or_other_prompts_are_refused(tmp_path: Path) -> None:
    begin_drawing(tmp_path / "out", drawing(tmp_path))
    with pytest.raises(ConfigError, match='json.: benchmark is "dpg" there, "geneval" here. Name another folder'):
        check_drawing(tmp_path / "out", drawing(tmp_path, "geneval"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(DPG | {"0": "Nine cabbages."}), encoding="utf-8")
    ours = drawing(tmp_path)
    changed = Drawing.of(
        small("dpg"), small("dpg").read(other), model=ours.model, size_px=(1024, 1024), settings=SETTINGS, seed=0
    )
    with pytest.raises(ConfigError, match='json.: prompts_sha256 is "[0-9a-f]+.* there, "[0-9a-f]+.* here. Name'):
        check_drawing(tmp_path / "out", changed)


def test_a_folder_without_a_drawing_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="out: exists and holds no drawing .drawing.json is missing.; name a new"):
        begin_drawing(out, drawing(tmp_path))
    with pytest.raises(ConfigError, match="out: holds no drawing .drawing.json is missing."):
        read_drawing(out)
    for content, message in (("{", "cannot be read"), ("[]", "is list, expected an object")):
        (out / "drawing.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=f"drawing.json: {message}"):
            begin_drawing(out, drawing(tmp_path))
