"""`bitdance evaluate draw` in one process: what it writes of the model, and folders that lack a part of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitdance_scale.cli.evaluate_draw import main
from tests.released import write_published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "ours")


def draw(model: Path, out: Path) -> dict:
    prompts = out.with_suffix(".json")
    prompts.write_text(json.dumps({"first": "a red circle"}))
    options = ["--steps", "1", "--guidance", "1", "--size", "32x32", "--nproc", "1"]
    assert main(["dpg", str(model), "--prompts", str(prompts), "--out", str(out), *options]) == 0
    return json.loads((out / "drawing.json").read_text())


def test_a_drawing_says_how_many_tokens_are_drawn_at_once_and_one_that_does_not_is_drawn_on(published, tmp_path):
    record = draw(published, tmp_path / "out")
    assert record["model"]["block_tokens"] == 16 and len(record["model"]["sha256"]) == 64
    del record["model"]["block_tokens"]
    (tmp_path / "out/drawing.json").write_text(json.dumps(record))
    before = (tmp_path / "out/first.png").read_bytes()
    (tmp_path / "out/first.png").unlink()
    assert draw(published, tmp_path / "out") == record
    assert (tmp_path / "out/first.png").read_bytes() == before
