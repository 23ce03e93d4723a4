"""A small version of the demo tokenizer's training, with everything that can be switched on switched on."""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.config.load import load_config
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.demo.shards import write_shards

DEMO = CONFIGS / "demo_tokenizer.toml"
SIZES = (
    "autoencoder.num_bits=16", "autoencoder.channels=32", "autoencoder.channel_mult=[1, 1]",
    "autoencoder.norm_groups=32", "data.sizes_px=[[16, 16]]", "optim.average_decay=0.0", "evaluate.weights=trained",
    "run.output_dtype=float32",
)  # fmt: skip
ADVERSARY = (
    "adversarial.weight=0.1", "adversarial.channels=8", "adversarial.num_layers=2", "adversarial.start_step=1",
    "adversarial.lecam_weight=1.0", "adversarial.lecam_decay=0.5",
)  # fmt: skip


def small_tokenizer(folder: Path, *overrides: str, num_images: int = 7) -> list[str]:
    """Overrides of the demo tokenizer's configuration: two levels, `num_images` crops of 16 px a step, no W&B.

    Shards are expected in `folder` (`write_small_shards`); runs go to `folder / "runs"`.
    """
    return [
        *SIZES, "run.dtype=float32", "run.steps=4", "observe.log_every_steps=1", "observe.wandb_mode=disabled",
        f'run.root={folder / "runs"}', f'run.output={folder / "weights"}', f'data.index_dir={folder / "index"}',
        f'data.shards=["{folder / "train"}"]', f'evaluate.shards=["{folder / "held_out"}"]',
        f"data.images_px={num_images * 256}", "evaluate.sizes_px=[[16, 16]]", "evaluate.num_images=2",
        "evaluate.every_steps=100", "checkpoint.in_background=false", "optim.warmup_steps=0",
        "optim.schedule=constant", *overrides,
    ]  # fmt: skip


def write_small_shards(folder: Path) -> None:
    """Draws the images of `small_tokenizer` into `folder`."""
    write_shards(folder / "train", num_images=16, per_shard=8, seed=0)
    write_shards(folder / "held_out", num_images=2, per_shard=2, seed=1)


def small_config(folder: Path, *overrides: str, num_images: int = 7) -> TokenizerConfig:
    """`small_tokenizer` as a configuration."""
    return load_config(DEMO, small_tokenizer(folder, *overrides, num_images=num_images), TokenizerConfig)
