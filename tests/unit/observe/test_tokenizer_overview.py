"""The page about a tokenizer's training, from the files of its folder, and `bitdance plot` of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli.plot_run import main
from bitdance_scale.evaluation.pairs import Pairs, draw_pairs
from bitdance_scale.observe.tokenizer_overview import read_tokenizer_run, tokenizer_overview

STEPS = [
    {"step": step, "images": 8 * step, "loss": 1 / step, "l1": 0.5 / step, "l2": 0.0, "lpips": 0.0, "adversarial": 0.7,
     "entropy_token": 1.0, "entropy_codebook": 4.0, "grad_norm": None, "images_per_s": 20.0}
    for step in (1, 2, 2, 3)
]  # fmt: skip
EVALUATION = {"step": 3, "psnr_db": {"64x64": 20.5, "32x32": 18.0}, "code_share": {"64x64": 0.5, "32x32": 0.25}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "tokenizer_run"
    (run / "reconstructions").mkdir(parents=True)
    (run / "config.toml").write_text("[autoencoder]\nnum_bits = 32\n")
    torn = json.dumps(STEPS[0])[:9]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in STEPS) + torn)
    (run / "evaluation.jsonl").write_text(json.dumps(EVALUATION) + "\n")
    return run


def draw(folder: Path) -> Image.Image:
    return Image.open(io.BytesIO(tokenizer_overview(read_tokenizer_run(folder))))


def test_each_step_is_read_once_and_the_newest_picture_is_below_the_plots(folder: Path):
    run = read_tokenizer_run(folder)
    assert [record["step"] for record in run.metrics] == [1, 2, 3] and run.picture is None
    assert run.summary() == "3 steps, 24 images, PSNR 20.50 dB at 64x64, 18.00 dB at 32x32"
    without = draw(folder)
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    for step, channel in ((1, 0), (3, 2)):
        pixels[...] = np.where(np.arange(3) == channel, 250, 5)
        tiles = [pixels.copy()]
        picture = draw_pairs([Pairs("32 x 32", "20.0 dB", tiles, tiles)])
        picture.save(folder / "reconstructions" / f"step_{step:08d}.png")
    page = draw(folder)
    assert page.width == without.width and page.height > without.height
    drawn = np.asarray(page.convert("RGB")).astype(int)
    is_red, is_blue = ((np.abs(drawn - colour).max(axis=-1) < 20).sum() for colour in ((250, 5, 5), (5, 5, 250)))
    assert is_blue > 1000 and is_red == 0


def test_plot_draws_a_tokenizer_run_by_itself(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "page.png"
    assert main([str(folder), "--out", str(out)]) == 0
    assert Image.open(out).width > 1000 and "tokenizer_run: 3 steps" in capsys.readouterr().out
    assert main([str(folder), str(folder), "--out", str(tmp_path / "two.png")]) == 2
    assert "is drawn alone" in capsys.readouterr().err and not (tmp_path / "two.png").exists()
