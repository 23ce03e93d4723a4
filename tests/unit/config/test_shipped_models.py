"""Models that come with the package, by name; and the one that does."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from ship_demo_model import MAX_BYTES

from bitdance_scale.cli.sample import main as sample
from bitdance_scale.config import shipped_models
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.vision.weights import weights_digest

DEMO = ASSETS / "demo"
# What training needs and is not of the model.
TOKENIZERS = ("ae.safetensors", "ae_config.json", "tokenizer.model")


def test_a_name_is_found_from_any_folder_and_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "assets" / "small").mkdir(parents=True)
    (tmp_path / "assets" / "small" / "vision_head_config.json").write_text("{}")
    (tmp_path / "assets" / "tokenizer_alone").mkdir()
    monkeypatch.setattr(shipped_models, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert shipped_models.shipped_models() == ["small"]
    assert model_path("small") == tmp_path / "assets" / "small"
    assert [model_path(name) for name in ("tokenizer_alone", "runs/small", "absent")] == [
        Path("tokenizer_alone"),
        Path("runs/small"),
        Path("absent"),
    ]
    (tmp_path / "small").mkdir()
    assert model_path("small") == Path("small")


class TestDemo:
    def test_it_is_small_and_says_where_it_is_from(self):
        model = [path for path in DEMO.iterdir() if path.name not in TOKENIZERS]
        assert sum(path.stat().st_size for path in model) <= MAX_BYTES
        provenance = json.loads((DEMO / "provenance.json").read_text(encoding="utf-8"))
        assert provenance["autoencoder_sha256"] == weights_digest(DEMO / "ae.safetensors")
        assert len(provenance["commit"]) == 40 and not provenance["has_changes"]
        assert provenance["scene_score"]["num_pictures"] >= 300

    def test_it_draws_its_prompts(self, tmp_path, capsys):
        out = tmp_path / "drawn"
        assert sample(["demo", "--out", str(out), "--steps", "2"]) == 0
        assert f"{out}: 8 pictures" in capsys.readouterr().out
        assert len(list(out.glob("0*.png"))) == 8 and Image.open(out / "00000.png").size == (64, 64)
