"""A small version of the demo for tests that run the whole trainer: few images, an untrained tokenizer, two layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def small_demo(folder: Path, *, num_steps: int, save_every: int) -> list[str]:
    """Draws the images and the tokenizer's weights into `folder`; returns overrides of the demo configuration."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.demo.shards import write_shards
    from bitdance_scale.vision.tokenizer import make_autoencoder

    write_shards(folder / "shards", num_images=60, per_shard=30, seed=0)
    torch.manual_seed(0)
    save_file(make_autoencoder(load_config("demo").vision).state_dict(), folder / "ae.safetensors")
    return [
        f"data.shards=['{folder / 'shards'}']",
        f"vision.weights='{folder / 'ae.safetensors'}'",
        "model.num_layers=2",
        "data.global_batch=10",
        f"run.steps={num_steps}",
        f"checkpoint.every_steps={save_every}",
        "sample.every_steps=0",
        "evaluate.shards=[]",
        "evaluate.benchmarks=[]",
        "observe.wandb_mode=disabled",
    ]
