"""Twelve pictures of one's own: packed, trained by two replicas beside a held-out one, and told what they lack."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.large, pytest.mark.timeout(600)]


def bitdance(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bitdance_scale.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_twelve_pictures_are_packed_and_trained(tmp_path):
    pictures, numbers = tmp_path / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(12):
        # The third is smaller than any bucket, and the fifth has no caption.
        height, width = (20, 24) if number == 3 else (160, 200)
        pixels = numbers.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        if number != 5:
            (pictures / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    printed = bitdance(tmp_path, "pack", "pictures", "shards", "--held-out", "0.2")
    assert "12 of 12" not in printed and "held out: " in printed and "missing_caption 1, first 5.png" in printed
    settings = [
        *small_demo(tmp_path / "material", num_steps=4, save_every=100),
        "data.shards=['shards']",
        "evaluate.shards=['shards/held_out']",
        "evaluate.every_steps=2",
        "data.global_batch=20",
    ]
    printed = bitdance(tmp_path, "train", "demo", "--nproc", "2", *settings)
    for text in (
        "images are smaller than any bucket and are not trained",
        "1 of ",
        "images have no usable caption and are trained without words",
        "images are fewer than a step takes (data.global_batch=20): each is seen about",
        "held-out images are too few for evaluate.images=",
    ):
        assert text in printed, printed
    metrics = read_metrics(tmp_path / "runs" / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == [1, 2, 3, 4] and all(math.isfinite(point.loss) for point in metrics)
