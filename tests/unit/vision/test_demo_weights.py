"""The weights that ship with the demo do what docs/vision_tokenizer.md says, on scenes not used in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped import ASSETS, CONFIGS
from bitdance_scale.demo.scenes import make_scene, render
from bitdance_scale.evaluation.pixels import psnr_db
from bitdance_scale.vision.autoencoder import published_sizes
from bitdance_scale.vision.bits import unpack_bits
from bitdance_scale.vision.tokenizer import VisionTokenizer

ROOT = Path(__file__).parents[3]
DEMO = ASSETS / "demo"
HELD_OUT_SEED = 4242


def square_scenes(side_px: int, count: int) -> list[torch.Tensor]:
    scenes = (make_scene(HELD_OUT_SEED, index) for index in range(2000))
    chosen = [scene for scene in scenes if scene.size_px[0] == scene.size_px[1] >= side_px][:count]
    pictures = [render(scene).resize((side_px, side_px)) for scene in chosen]
    return [torch.from_numpy(np.array(picture)) for picture in pictures]


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    section = load_config(CONFIGS / "demo.toml", schema=RunConfig).vision
    return VisionTokenizer(dataclasses.replace(section, weights=str(DEMO / "ae.safetensors")), "cpu")


@pytest.mark.parametrize("side_px", [32, 64, 128])
def test_held_out_scenes_come_back_with_at_least_24_db(tokenizer: VisionTokenizer, side_px: int):
    images = square_scenes(side_px, count=32)
    grid = (side_px // 4, side_px // 4)
    bits = tokenizer.encode(images)
    decoded = torch.stack([tokenizer.decode(packed, grid) for packed in bits])
    assert psnr_db(decoded.numpy(), torch.stack(images).numpy()).mean() > 24
    # A bit that never changes would carry nothing for a model to learn.
    share = (unpack_bits(np.concatenate(bits)) > 0).mean(axis=0)
    assert share.min() > 0.02 and share.max() < 0.98


def test_weights_are_small_and_their_sizes_stand_beside_them(tokenizer: VisionTokenizer):
    assert (DEMO / "ae.safetensors").stat().st_size <= 4_000_000
    sizes = published_sizes(json.loads((DEMO / "ae_config.json").read_text()), "ae_config.json")
    assert sizes == {name: getattr(tokenizer.section, name) for name in sizes}
