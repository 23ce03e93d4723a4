"""`bitdance tokenizer evaluate`: its table, its picture, and what it says about a wrong folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bitdance_scale.cli.evaluate_tokenizer import main
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import CheckpointError
from bitdance_scale.train.tokenizer_report import NUM_COLUMNS, TILE_PX
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import load_autoencoder, save_weights

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", Autoencoder(**SIZES).state_dict(), published_config(**SIZES))
    return tmp_path / "weights"


def test_table_and_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_shards(tmp_path / "shards", num_images=6, per_shard=6, seed=0)
    picture = tmp_path / "picture.png"
    options = ["--sizes", "16", "32", "--images", "3", "--picture", str(picture)]
    assert main([str(folder), str(tmp_path / "shards"), *options]) == 0
    printed = capsys.readouterr().out
    assert "| 16 x 16 |" in printed and "| 32 x 32 |" in printed and "encode" in printed
    width, height = Image.open(picture).size
    assert width >= NUM_COLUMNS * TILE_PX and height >= 4 * TILE_PX


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
