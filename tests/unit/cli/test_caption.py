"""`bitdance caption` from pictures to captions, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.cli.caption import main
from tests.released import class_file_content, edit_config, write_published

FAST = ["--size", "32x48", "--size", "32x32", "--max-tokens", "5", "--device", "cpu"]


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"), backbone_dtype=torch.float32)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder below and turned by its EXIF, and a file that is none."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for name, size in (("wide.png", (40, 70)), ("square.webp", (64, 64)), ("below/turned.jpg", (80, 50))):
        image = Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6 if name.startswith("below") else 1
        image.save(root / name, exif=exif)
    (root / "notes.txt").write_text("no picture", encoding="utf-8")
    return root


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_pictures(folder, pictures, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    assert run(folder, pictures, "--out", out, "--batch-size", 2, *FAST) == 0
    found = records(out)
    assert [Path(line["file"]).name for line in found] == ["turned.jpg", "square.webp", "wide.png"]
    assert [line["size_px"] for line in found] == [[32, 48], [32, 32], [32, 48]]
    assert all(line.keys() >= {"caption", "num_tokens", "is_ended"} for line in found)
    assert all(line["num_tokens"] == 5 and not line["is_ended"] for line in found)
    assert found[0]["context"] == "plain" and "seed" not in found[0]
    # Alone, on the screen.
    capsys.readouterr()
    assert run(folder, pictures / "wide.png", *FAST) == 0
    assert found[2]["caption"].strip() in capsys.readouterr().out


def test_draws_depend_on_the_seed_and_the_file(folder, pictures, tmp_path):
    drawn = ["--top-p", "0.95", "--temperature", "2", *FAST]

    def captions(*arguments: object) -> dict[str, str]:
        out = tmp_path / "captions.jsonl"
        assert run(folder, *arguments, "--out", out, "--force", *drawn) == 0
        assert records(out)[0]["seed"] == records(out)[-1]["seed"]
        return {Path(line["file"]).name: line["caption"] for line in records(out)}

    together = captions(pictures, "--seed", 3)
    assert captions(pictures / "wide.png", "--seed", 3) == {"wide.png": together["wide.png"]}
    assert captions(pictures, "--seed", 4) != together


def test_the_folder_says_how_images_are_laid(folder, pictures, tmp_path):
    def captions(*options: str) -> list[tuple[str, str]]:
        out = tmp_path / "captions.jsonl"
        assert run(folder, pictures, "--out", out, "--force", *options, *FAST) == 0
        return [(line["context"], line["caption"]) for line in records(out)]

    plain, asked = captions(), captions("--context", "queries")
    assert plain != asked and {context for context, _ in asked} == {"queries"}
    edit_config(folder, bitdance_context="queries")
    try:
        assert captions() == asked and captions("--context", "plain") == plain
    finally:
        edit_config(folder, bitdance_context=None)


def test_what_cannot_be_described_is_named(folder, pictures, tmp_path, capsys):
    def refusal(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "empty: holds no image; expected files that end in .png" in refusal(folder, tmp_path / "empty", *FAST)
    assert "absent.png: there is no such file or folder" in refusal(folder, tmp_path / "absent.png", *FAST)
    (pictures / "broken.png").write_bytes(b"no picture")
    assert "broken.png: bad_image: not a JPEG, PNG or WebP" in refusal(folder, pictures, *FAST)
    # The header is sound and the rest is not there.
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "broken.png").write_bytes(whole[: len(whole) // 2])
    assert "broken.png: bad_image" in refusal(folder, pictures, *FAST)
    (pictures / "broken.png").unlink()
    (pictures / "fl\udcf6te.png").write_bytes(whole)
    assert r"fl\udcf6te.png': its name is not UTF-8" in refusal(folder, pictures, *FAST)
    (pictures / "fl\udcf6te.png").unlink()
    small = refusal(folder, pictures, "--size", "48x64", "--device", "cpu")
    assert "wide.png: 40 x 70 px. The sizes are 48x64, 64x48" in small and "--max-upscale" in small
    assert run(folder, pictures, "--size", "48x64", "--max-upscale", "1.5", "--max-tokens", "1") == 0
    assert "--size: this model has 4 px a cell" in refusal(folder, pictures)
    assert "height = 33" in refusal(folder, pictures, "--size", "33x32")
    assert "top_p = 2.0: must be" in refusal(folder, pictures, "--top-p", 2, *FAST)
    assert "--seed -1" in refusal(folder, pictures, "--seed", -1, *FAST)
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    assert "is there already" in refusal(folder, pictures, "--out", tmp_path / "out", *FAST)
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_other_models_are_told_what_they_are(folder, pictures, tmp_path, capsys):
    def refusal(model: Path) -> str:
        capsys.readouterr()
        assert run(model, pictures, *FAST) == 2
        return capsys.readouterr().err

    run_folder = tmp_path / "run"
    import_release(open_source(folder, None), run_folder)
    for model in (run_folder, find_checkpoint(run_folder)):
        assert f"export it first: `bitdance export {model} PUBLISHED`" in refusal(model)
    torch.save({"model": class_file_content()}, tmp_path / "classes.pt")
    import_release(open_class_source(PickledFile(tmp_path / "classes.pt")), tmp_path / "class_run")
    assert "is a run of a class-conditional network, which has no words" in refusal(tmp_path / "class_run")
    fix = "name a published folder, as `bitdance export RUN FOLDER` writes it"
    assert f"FOLDER {tmp_path / 'absent'}: no such folder; {fix}" in refusal(tmp_path / "absent")
    assert f"FOLDER {pictures}: is no model; {fix}" in refusal(pictures)
    (pictures / "config.toml").write_text("", encoding="utf-8")
    assert "pictures: no checkpoint is there; it is a run that has saved none yet" in refusal(pictures)
    for name in ("BitDance_B_4x.pt", "classes/model_config.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    for model in (tmp_path / "BitDance_B_4x.pt", tmp_path / "classes"):
        assert "A class-conditional network has no words" in refusal(model)
