"""`bitdance sample` from prompts to pictures, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli import caption, evaluate_draw, import_release
from bitdance_scale.cli.sample import main
from bitdance_scale.config import shipped_models
from bitdance_scale.generate.requests import _num_columns
from tests.released import write_published

FAST = ["--steps", "2", "--guidance", "2", "--size", "32x48", "--device", "cpu"]


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return sorted(lines, key=lambda line: line["number"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_prompt_file(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "two blue\u2028squares", "height": 32, "width": 32},
        {"prompt": "a blue circle", "seed": 7},
        {"prompt": "a red square and a blue one"},
    ]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    prompts.write_text(content, encoding="utf-8")
    out = tmp_path / "out"
    assert run(folder, "--prompts", prompts, "--out", out, "--seed", 3, "--batch-size", 2, *FAST) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {*(f"0000{i}.png" for i in range(4)), "grid.png", "requests.jsonl"}
    assert [pixels(out / f"0000{i}.png").shape for i in range(4)] == [
        (32, 48, 3),
        (32, 32, 3),
        (32, 48, 3),
        (32, 48, 3),
    ]
    found = records(out)
    assert [line["seed"] for line in found] == [3, 4, 7, 6]
    assert [line["prompt"] for line in found] == [line["prompt"] for line in lines]
    expected = {"height": 32, "width": 32, "steps": 2, "guidance": 2.0, "sampler": "euler_maruyama"}
    assert found[1].items() >= (expected | {"folder": str(folder), "file": "00001.png"}).items()
    assert all(line["seconds"] > 0 for line in found)
    # Image 3 alone, from what its line says.
    alone = tmp_path / "alone"
    assert run(folder, "--prompt", found[3]["prompt"], "--out", alone, "--seed", 6, *FAST) == 0
    assert (pixels(alone / "00000.png") == pixels(out / "00003.png")).all()


def test_only_an_empty_folder_is_written_to(folder, tmp_path, capsys):
    for name in ("00005.png", "notes.txt"):
        (tmp_path / name).write_text("kept")
    arguments = [folder, "--prompt", "a", "--prompt", "b", "--out", tmp_path, *FAST]
    assert run(*arguments) == 2
    assert re.search("is not empty; .*--force", capsys.readouterr().err)
    assert run(*arguments, "--force", "--size", "33x32") == 2
    assert re.search("height = 33", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00005.png", "notes.txt"]
    assert run(*arguments, "--force") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.png", "00001.png", "grid.png", "notes.txt", "requests.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"', ":1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', ":2: must be an object with prompt"),
        ('{"prompt": "a", "steps": 3}', ":1: must be an object"),
        ('{"prompt": 3}', "prompt = 3: must be text"),
        ('{"prompt": "a"}\n{"prompt": "b \\ud83d"}', r":2: prompt = 'b \\ud83d': holds what is no character in UTF-8"),
        ('{"prompt": "a", "seed": -1}', "seed = -1: must be an integer"),
        ('{"prompt": "a", "height": "32"}', "height = '32': must be a number of pixels"),
        ('{"prompt": "a", "height": 31}', "height = 31"),
        (b'{"prompt": "a fl\xf6te"}', "is not UTF-8 text .*; save it as UTF-8"),
    ],
)
def test_faulty_prompt_files_are_refused(folder, tmp_path, capsys, content, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(folder, "--prompts", prompts, "--out", tmp_path / "out", *FAST) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "--size 32: must be HEIGHTxWIDTH"),
        (["--steps", "0"], "steps = 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "--seed -1"),
        (["a red circle"], "'a red circle': is no section.key=value; give a prompt with --prompt 'a red circle'"),
        (["sample.num_steps=3"], "is a published folder, .* leave out sample.num_steps=3"),
    ],
)
def test_faulty_arguments_are_refused(folder, tmp_path, capsys, arguments, message):
    assert run(folder, "--prompt", "a", "--out", tmp_path / "out", *FAST, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_prompts_that_are_no_text_are_refused(folder, tmp_path, capsys):
    # So Python has an argument of bytes that are not UTF-8.
    assert run(folder, "--prompt", "a", "--prompt", "fl\udcf6te", "--out", tmp_path / "out", *FAST) == 2
    assert r"--prompt = 'fl\udcf6te': holds what is no character in UTF-8" in capsys.readouterr().err
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (own / "sampling.json").write_text('{"prompts": ["a \\ud83d"]}')
    assert run(own, "--out", tmp_path / "out", *FAST) == 2
    assert r"own: prompts = 'a \ud83d': holds what is no character" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_says_how_it_is_drawn_with(folder, tmp_path, capsys, monkeypatch):
    own = tmp_path / "assets" / "small"
    shutil.copytree(folder, own)
    section = {"size_px": [32, 48], "num_steps": 2, "guidance": 2.0, "prompts": ["a red circle", "a blue one"]}
    (own / "sampling.json").write_text(json.dumps(section))
    monkeypatch.setattr(shipped_models, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert run("small") == 0
    assert "wrote samples/small: 2 pictures, and samples/small/grid.png" in capsys.readouterr().out
    found = records(Path("samples/small"))
    assert [line["prompt"] for line in found] == ["a red circle", "a blue one"]
    drawn_with = {"height": 32, "width": 48, "steps": 2, "guidance": 2.0, "sampler": "euler_maruyama"}
    assert all(line.items() >= (drawn_with | {"folder": str(own)}).items() for line in found)
    assert run("small", "--prompt", "a blue one", "--seed", 1, "--steps", 1) == 0
    (line,) = records(Path("samples/small-2"))
    assert (line["prompt"], line["seed"], line["steps"], line["guidance"]) == ("a blue one", 1, 1, 2.0)
    (own / "sampling.json").write_text('{"num_steps": 0}')
    assert run("small") == 2
    assert re.search("sampling.json: num_steps = 0: must be at least 1", capsys.readouterr().err)
    assert not Path("samples/small-3").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            evaluate_draw,
            ["demo-scenes", "small", "--weights", "averaged", "--out", "out"],
            "assets/small is a published",
        ),
        (caption, ["small", "absent.png"], "this model has 4 px a cell"),
        (import_release, ["small", "small-run/out"], "small-run/out: there is no folder small-run"),
    ],
)
def test_other_commands_find_it_too(folder, tmp_path, capsys, monkeypatch, command, arguments, message):
    shutil.copytree(folder, tmp_path / "assets" / "small")
    monkeypatch.setattr(shipped_models, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_prompts(folder, tmp_path, capsys):
    assert run(folder, "--out", tmp_path / "out", *FAST) == 2
    assert re.search("has no prompts of its own; name some with --prompt or --prompts", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("num_images", "columns"), [(1, 1), (3, 3), (6, 3), (8, 4), (9, 3), (10, 5), (64, 8)])
def test_grids_have_few_empty_places(num_images, columns):
    assert _num_columns(num_images) == columns


def test_no_folder_and_no_prompt_file(folder, tmp_path, capsys):
    assert run("nowhere", "--prompt", "a", "--out", tmp_path / "out") == 2
    assert re.search("MODEL nowhere: no such folder; name a published folder, a run", capsys.readouterr().err)
    assert run(folder, "--prompts", "none.txt", "--out", tmp_path / "out") == 2
    assert re.search("none.txt: no such file", capsys.readouterr().err)
