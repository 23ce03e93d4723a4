"""The weights that ship with the demos do what docs/vision_tokenizer.md says, on scenes not used in training."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped import setting_path
from bitdance_scale.demo.scenes import make_scene, render
from bitdance_scale.evaluation.pixels import psnr_db
from bitdance_scale.vision.autoencoder import published_sizes
from bitdance_scale.vision.bits import unpack_bits
from bitdance_scale.vision.tokenizer import VisionTokenizer

HELD_OUT_SEED = 4242
NUM_SCENES = 16
"""Of each size."""


@functools.cache
def square_scenes(side_px: int) -> list[torch.Tensor]:
    chosen, index = [], 0
    while len(chosen) < NUM_SCENES:
        scene = make_scene(HELD_OUT_SEED, index)
        index += 1
        if scene.size_px[0] == scene.size_px[1] >= side_px:
            chosen.append(torch.from_numpy(np.array(render(scene).resize((side_px, side_px)))))
    return chosen


@functools.cache
def tokenizer_of(name: str) -> VisionTokenizer:
    """The tokenizer that a shipped configuration trains with."""
    return VisionTokenizer(load_config(name, schema=RunConfig).vision, "cpu")


@pytest.mark.parametrize(("name", "side_px", "least_db"), [("demo", 64, 27), ("demo", 128, 30), ("class_demo", 32, 24)])
def test_held_out_scenes_come_back(name: str, side_px: int, least_db: float):
    tokenizer, images = tokenizer_of(name), square_scenes(side_px)
    cells = side_px // tokenizer.section.downsample
    bits = tokenizer.encode(images)
    decoded = torch.stack([tokenizer.decode(packed, (cells, cells)) for packed in bits])
    assert psnr_db(decoded.numpy(), torch.stack(images).numpy()).mean() >= least_db
    # A bit that never changes would carry nothing for a model to learn.
    share = (unpack_bits(np.concatenate(bits)) > 0).mean(axis=0)
    assert share.min() > 0.02 and share.max() < 0.98


@pytest.mark.parametrize("name", ["demo", "class_demo"])
def test_weights_are_small_and_their_sizes_stand_beside_them(name: str):
    section = tokenizer_of(name).section
    weights = Path(setting_path(section.weights))
    assert weights.stat().st_size < 4_000_000
    sizes = published_sizes(json.loads(weights.with_name("ae_config.json").read_text()), "ae_config.json")
    assert sizes == {name: getattr(section, name) for name in sizes}
