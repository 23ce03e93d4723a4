"""Small tokenizers, trained alike but for one setting and measured on images that were held out.

    python tools/photograph_shards.py data/photographs
    bitdance demo-data data/tokenizer data/tokenizer_held_out
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tokenizer_study.py [--only plain entropy_0] [--seeds 1 2]

Every variant is `bitdance train docs/results/tokenizer/base.toml` with the overrides below. A variant that is finished
is not trained again, so the same command goes on after a stop. Then the weights are read back and measured. Written to
OUT: metrics.json; runs/NAME.toml, the configuration of each run with every setting; runs/NAME.evaluation.jsonl; and
bits.webp, scenes.webp and adversarial.webp, held-out images over their reconstructions. The table is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitdance_scale.config.load import load_config
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.data.held_out import centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.evaluation.pixels import psnr_db
from bitdance_scale.observe.metrics import EVALUATION_FILE
from bitdance_scale.train.config_file import CONFIG_FILE
from bitdance_scale.train.tokenizer_evaluation import evaluate
from bitdance_scale.vision.weights import WEIGHTS_NAME, load_autoencoder

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "tokenizer"
BASE = RESULTS / "base.toml"
STARTED_FROM = "plain"
"""Whose encoder the second stage keeps."""

DOWN_32 = (
    "autoencoder.channel_mult=[1, 4, 8, 8, 8, 8]",
    "data.sizes_px=[[64, 64]]",
    "data.images_px=16384",
    "evaluate.sizes_px=[[64, 64]]",
)
# `bitdance demo-data data/tokenizer data/tokenizer_held_out` draws them.
SCENES = (*DOWN_32, "data.shards=['data/tokenizer']", "evaluate.shards=['data/tokenizer_held_out']")
PUBLISHED_QUANTISER = ("quantiser.temperature=0.01", "quantiser.entropy_weight=0.1", "quantiser.commit_weight=0.25")

VARIANTS: dict[str, tuple[str, ...]] = {
    "down_32_bits_32": DOWN_32,
    "down_32_bits_128": (*DOWN_32, "autoencoder.num_bits=128"),
    "down_32_bits_256": (*DOWN_32, "autoencoder.num_bits=256"),
    "scenes_bits_32": SCENES,
    "scenes_bits_128": (*SCENES, "autoencoder.num_bits=128"),
    "scenes_bits_256": (*SCENES, "autoencoder.num_bits=256"),
    "plain": (),
    "entropy_0": ("quantiser.entropy_weight=0",),
    "published_quantiser": PUBLISHED_QUANTISER,
    "published_entropy_0": ("quantiser.temperature=0.01", "quantiser.entropy_weight=0", "quantiser.commit_weight=0.25"),
    "adversarial": ("adversarial.weight=0.1", "adversarial.start_step=500"),
    "second_stage": ("autoencoder.gan_decoder=true", "run.trains=decoder", "adversarial.weight=0.1"),
}
REFERENCES = {
    "down_32_bits_128": "down_32_bits_32",
    "down_32_bits_256": "down_32_bits_32",
    "scenes_bits_128": "scenes_bits_32",
    "scenes_bits_256": "scenes_bits_32",
    "entropy_0": "plain",
    "published_quantiser": "plain",
    "published_entropy_0": "published_quantiser",
    "adversarial": "plain",
    "second_stage": "plain",
}
"""Variant -> the one that it is compared with, image by image."""
PICTURES = {
    "bits": ("down_32_bits_32", "down_32_bits_128", "down_32_bits_256"),
    "scenes": ("scenes_bits_32", "scenes_bits_128", "scenes_bits_256"),
    "adversarial": ("plain", "adversarial", "second_stage"),
}
"""Name of a picture -> whose reconstructions it shows, below the originals."""
NUM_PICTURED = 10


def train(name: str, seed: int) -> TokenizerConfig:
    """Trains a variant to its end, unless its weights are there; its configuration."""
    run = f"{name}_seed{seed}"
    root = load_config(BASE, schema=TokenizerConfig).run.root
    overrides = [f"run.name={run}", f"run.seed={seed}", f"run.output={root}/{run}/weights", *VARIANTS[name]]
    if name == "second_stage":
        overrides.append(f"run.start_from={root}/{STARTED_FROM}_seed{seed}/weights")
    config = load_config(BASE, overrides, schema=TokenizerConfig)
    if not (Path(config.run.output) / WEIGHTS_NAME).is_file():
        command = [sys.executable, "-m", "bitdance_scale.cli", "train", str(BASE), "--nproc", "1", *overrides]
        begun_s = time.monotonic()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(f"{run}: trained in {time.monotonic() - begun_s:.0f} s", flush=True)
    return config


def sharpness(images: np.ndarray) -> np.ndarray:
    """float64 [n], mean absolute difference of neighbouring pixels of uint8 images [n, H, W, 3], in grey levels."""
    pixels = images.astype(np.float64)
    axes = (np.abs(np.diff(pixels, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2))
    return 0.5 * sum(axes)


def measure(config: TokenizerConfig, images: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """What is recorded of a run's weights, and uint8 [n, H, W, 3], what they make of the images.

    Args:
        config: of the run, which is finished.
        images: uint8 [n, H, W, 3], held out.
    """
    found = evaluate(load_autoencoder(config.run.output), images, config.num_groups, torch.device("cpu"))
    quality = psnr_db(found.decoded, images)
    balance = np.clip(found.bit_balance, 1e-12, 1 - 1e-12)
    bit_entropies = -(balance * np.log2(balance) + (1 - balance) * np.log2(1 - balance))
    relative = sharpness(found.decoded).mean() / sharpness(images).mean()
    return {
        "psnr_db": round(float(quality.mean()), 3),
        "psnr_standard_error_db": round(float(quality.std(ddof=1) / np.sqrt(len(quality))), 3),
        "sharpness_over_originals": round(float(relative), 3),
        "code_entropy_bits": round(found.code_entropy_bits, 3),
        "code_share": round(found.code_share, 4),
        "bit_entropy": round(float(bit_entropies.mean()), 4),
        "constant_bits_share": round(float((np.minimum(balance, 1 - balance) < 0.01).mean()), 4),
    }, found.decoded


def compare(decoded: np.ndarray, reference: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """How much higher the PSNR of images [n, H, W, 3] is than that of a reference: a paired difference in dB."""
    difference = psnr_db(decoded, images) - psnr_db(reference, images)
    return {
        "psnr_over_reference_db": round(float(difference.mean()), 3),
        "psnr_over_reference_standard_error_db": round(float(difference.std(ddof=1) / np.sqrt(len(difference))), 3),
    }


def held_out(config: TokenizerConfig) -> np.ndarray:
    """uint8 [n, H, W, 3], the held-out images of the first size of a configuration."""
    shards = expand_shards(config.evaluate.shards)
    index = build_index(shards, default_index_dir(shards))
    return centre_crops(index, config.evaluate.sizes_px[0], config.evaluate.num_images)


def picture(rows: Sequence[np.ndarray]) -> Image.Image:
    """Some images of every row, uint8 [n, H, W, 3], the same ones below each other, enlarged to 96 px."""
    places = np.linspace(0, len(rows[0]) - 1, NUM_PICTURED).astype(int)
    joined = Image.fromarray(np.concatenate([np.concatenate(list(row[places]), axis=1) for row in rows]))
    scale = 96 / rows[0].shape[1]
    return joined.resize((round(joined.width * scale), round(joined.height * scale)), Image.Resampling.NEAREST)


def table(metrics: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """Markdown, a row for each run."""
    columns = {
        "PSNR (dB)": lambda run: f"{run['psnr_db']:.2f} +- {run['psnr_standard_error_db']:.2f}",
        "over reference (dB)": _over_reference,
        "sharpness": lambda run: f"{run['sharpness_over_originals']:.2f}",
        "code entropy (of 8 bits)": lambda run: f"{run['code_entropy_bits']:.2f}",
        "entropy of a bit": lambda run: f"{run['bit_entropy']:.2f}",
        "constant bits": lambda run: f"{run['constant_bits_share']:.0%}",
    }
    lines = [f"| run | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(metrics[name]) for cell in columns.values())} |" for name in names]
    return "\n".join(lines)


def _over_reference(run: dict[str, Any]) -> str:
    if "psnr_over_reference_db" not in run:
        return ""
    return f"{run['psnr_over_reference_db']:+.2f} +- {run['psnr_over_reference_standard_error_db']:.2f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of weights, data order and noise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: docs/results/tokenizer")
    options = parser.parse_args()
    metrics_file, runs = options.out / "metrics.json", options.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else {}
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for seed in options.seeds:
        for name in options.only:
            config = train(name, seed)
            run, images = config.run.name, held_out(config)
            metrics[run], decoded = measure(config, images)
            seen[run] = images, decoded
            reference = f"{REFERENCES.get(name)}_seed{seed}"
            if reference in seen:
                metrics[run] |= compare(decoded, seen[reference][1], images)
            folder = Path(config.run.root) / run
            shutil.copyfile(folder / CONFIG_FILE, runs / f"{run}.toml")
            shutil.copyfile(folder / EVALUATION_FILE, runs / f"{run}.{EVALUATION_FILE}")
            metrics_file.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({run: metrics[run]}), flush=True)
    for name, variants in PICTURES.items():
        shown = [seen[run] for variant in variants if (run := f"{variant}_seed{options.seeds[0]}") in seen]
        if len(shown) == len(variants):
            rows = [shown[0][0], *(decoded for _, decoded in shown)]
            picture(rows).save(options.out / f"{name}.webp", quality=90, method=6)
    print(f"\n{table(metrics, sorted(metrics))}")


if __name__ == "__main__":
    main()
