"""The tool that scores demo scenes."""

from __future__ import annotations

import json

import score_scenes


def test_the_tool_scores_drawn_scenes(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "scores"
    assert score_scenes.main(["--real", "--out", str(out), "--per-category", "2"]) == 0
    assert json.loads((out / "score.json").read_text())["overall"] == 1.0
    lines = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(12)) and len(list(out.glob("0*.png"))) == 12
    assert "overall" in capsys.readouterr().out
    assert score_scenes.main(["--real", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert score_scenes.main(["--out", str(tmp_path / "other")]) == 2
    assert "name a published folder" in capsys.readouterr().err
