"""tools/sample.py from prompts to pictures, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.released import write_published

SCRIPT = Path(__file__).parents[3] / "tools" / "sample.py"
FAST = ["--steps", "2", "--guidance", "2", "--size", "32x48", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sample", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: line["number"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_prompt_file(folder, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "two blue squares", "height": 32, "width": 32},
        {"prompt": "a blue circle", "seed": 7},
        {"prompt": "a red square and a blue one"},
    ]
    prompts.write_text("\n\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    run(monkeypatch, folder, "--prompts", prompts, "--out", out, "--seed", 3, "--batch-size", 2, *FAST)
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
    run(monkeypatch, folder, "--prompt", found[3]["prompt"], "--out", alone, "--seed", 6, *FAST)
    assert (pixels(alone / "00000.png") == pixels(out / "00003.png")).all()


def test_only_an_empty_folder_is_written_to(folder, tmp_path, monkeypatch):
    for name in ("00005.png", "notes.txt"):
        (tmp_path / name).write_text("kept")
    arguments = [folder, "--prompt", "a", "--prompt", "b", "--out", tmp_path, *FAST]
    with pytest.raises(SystemExit, match="is not empty; .*--force"):
        run(monkeypatch, *arguments)
    with pytest.raises(SystemExit, match="height = 33"):
        run(monkeypatch, *arguments, "--force", "--size", "33x32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00005.png", "notes.txt"]
    run(monkeypatch, *arguments, "--force")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.png", "00001.png", "grid.png", "notes.txt", "requests.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"', ":1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', ":2: must be an object with prompt"),
        ('{"prompt": "a", "steps": 3}', ":1: must be an object"),
        ('{"prompt": 3}', "prompt = 3: must be a text"),
        ('{"prompt": "a", "seed": -1}', "seed = -1: must be an integer"),
        ('{"prompt": "a", "height": "32"}', "height = '32': must be a number of pixels"),
        ('{"prompt": "a", "height": 31}', "height = 31"),
        (b'{"prompt": "a fl\xf6te"}', "cannot be read as UTF-8 text .*; save it so"),
    ],
)
def test_faulty_prompt_files_are_refused(folder, tmp_path, monkeypatch, content, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, "--prompts", prompts, "--out", tmp_path / "out", *FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "--size 32: must be HEIGHTxWIDTH"),
        (["--steps", "0"], "steps = 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_faulty_arguments_are_refused(folder, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, "--prompt", "a", "--out", tmp_path / "out", *FAST, *arguments)


def test_no_folder_and_no_prompt_file(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        run(monkeypatch, "nowhere", "--prompt", "a", "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="none.txt: no such file"):
        run(monkeypatch, "nowhere", "--prompts", "none.txt", "--out", tmp_path / "out")
