"""`bitdance tokenizer evaluate`: its table, page, numbers and picture, and what it says about wrong files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.cli.evaluate_tokenizer import main
from bitdance_scale.data.held_out import centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.pairs import NUM_COLUMNS, TILE_PX
from bitdance_scale.evaluation.pixels import psnr_db
from bitdance_scale.train.tokenizer_evaluation import evaluate
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import load_autoencoder, save_weights, weights_digest
from tests.unit.vision.test_perceptual import random_state

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", Autoencoder(**SIZES).state_dict(), published_config(**SIZES))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "shards"
    write_shards(folder, num_images=6, per_shard=6, seed=0)
    return folder


def test_table_page_and_picture(folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(random_state("alex"), tmp_path / "alex.pth")
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    options = ["--sizes", "32", "original", "--images", "4", "--shown", "1", f"--out={out}", f"--picture={picture}"]
    assert main([str(folder), str(shards), *options, f"--lpips-alex={tmp_path / 'alex.pth'}", "--nproc=1"]) == 0
    printed = capsys.readouterr().out
    assert "| 32 x 32 | 4 |" in printed and "| original | 4 |" in printed
    assert "Not measured, as no weights were named: LPIPS (vgg) (--lpips-vgg FILE), rFID (--inception FILE)." in printed
    # Lines of the log may come before it.
    assert printed[printed.index("| size") :].strip() in (out / "evaluation.md").read_text()
    width, height = Image.open(picture).size
    assert width >= NUM_COLUMNS * TILE_PX and 2 * TILE_PX <= height < 4 * TILE_PX

    record = json.loads((out / "evaluation.json").read_text())
    assert record["weights_digest"] == weights_digest(folder / "ae.safetensors")
    assert (record["downsampling"], record["compression"]) == (2, 6.0)
    numbers = record["sizes"]["32 x 32"]
    assert set(numbers) >= {"psnr_db", "psnr_flipped_db", "ssim", "lpips_alex"} and "rfid" not in numbers
    autoencoder = load_autoencoder(folder)
    images = centre_crops(build_index(expand_shards([str(shards)]), tmp_path / "index"), (32, 32), 4)
    result = evaluate(autoencoder, images, 2, torch.device("cpu"))
    assert (numbers["psnr_db"], numbers["ssim"]) == pytest.approx((result.psnr_db, result.ssim))
    assert numbers["psnr_flipped_db"] == pytest.approx(result.psnr_flipped_db)
    assert np.mean(numbers["code_share"]) == pytest.approx(result.code_share)
    assert np.mean(numbers["code_entropy_bits"]) == pytest.approx(result.code_entropy_bits, abs=1e-5)
    assert numbers["bit_share"] == pytest.approx(result.bit_balance.tolist())
    worst = int(np.argmin(psnr_db(result.decoded, images)))
    index = build_index(expand_shards([str(shards)]), tmp_path / "index")
    assert [found["key"] for found in numbers["worst"][:1]] == [index.name(worst)]
    assert numbers["worst"][0]["psnr_db"] < numbers["psnr_db"]
    html = (out / "evaluation.html").read_text()
    assert f"{index.name(worst)}: PSNR (dB) {numbers['worst'][0]['psnr_db']:.2f}" in html
    assert html.count("data:image/png;base64,") == 2 * 3 * 2 * len(numbers["worst"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "33"], "--sizes 33: must be a multiple of 2"),
        (["--sizes", "4"], "at least 7 px, the shortest side that SSIM can be computed of"),
        (["--sizes", "4096"], "none of 6 images covers a crop of 4096 x 4096 px"),
        (["--sizes", "big"], "argument --sizes: big: must be a whole number"),
        (["--lpips-vgg", "{}/vgg.pth"], "vgg.pth: features.2.weight is missing.* It holds AlexNet"),
        (["--out", "{}/vgg.pth"], "vgg.pth: is no folder"),
    ],
)
def test_what_cannot_be_measured_is_named(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    torch.save(random_state("alex"), tmp_path / "vgg.pth")
    options = [option.format(tmp_path) for option in options]
    assert main([str(folder), str(shards), "--nproc=1", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_without_weights_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert (
        "ae.safetensors: no such file; name a folder with ae.safetensors and ae_config.json" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("key", "value"), [("gan_decoder", "yes"), ("ddconfig", {}), ("ddconfig", None)])
def test_other_networks_are_refused(folder: Path, key: str, value: object):
    config = json.loads((folder / "ae_config.json").read_text()) | {key: value}
    (folder / "ae_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"ae_config.json: {key}"):
        load_autoencoder(folder)
