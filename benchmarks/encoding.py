"""Images per second that the frozen tokenizer encodes, and how many bits depend on precision and batch.

    python benchmarks/encoding.py                       on a GPU: the published sizes, random weights
    python benchmarks/encoding.py --device cpu          only shows that the script runs: a small one
    python benchmarks/encoding.py --weights FILE        trained weights of the published sizes

A bit is the sign of a latent, so that it flips where rounding moves a latent near 0 to the other side. Compared with
images that are encoded alone in float32 are: a batch in float32, and both in TF32 (`vision.precision`). Prints a line
of JSON for each way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from packs import machine

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.float32_products import PRECISIONS
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.vision.weights import WEIGHTS_NAME, save_weights

SMALL = {"channels": 32, "num_res_blocks": 1}
_SIZES = ("num_bits", "channels", "channel_mult", "num_res_blocks")


def random_weights(section: VisionSection, folder: Path) -> Path:
    """A weights file of a section's sizes."""
    torch.manual_seed(0)
    sizes = {name: getattr(section, name) for name in _SIZES}
    save_weights(str(folder), Autoencoder(**sizes).state_dict(), published_config(**sizes))
    return folder / WEIGHTS_NAME


def smooth_images(number: int, side_px: int) -> list[torch.Tensor]:
    """uint8 [side, side, 3] each: coloured noise of all scales, as photographs have."""
    numbers = np.random.default_rng(0)
    images = []
    for _ in range(number):
        total = torch.zeros(1, 3, side_px, side_px)
        size = 4
        while size <= side_px:
            noise = torch.from_numpy(numbers.standard_normal((1, 3, size, size))).float()
            total += torch.nn.functional.interpolate(noise, side_px, mode="bilinear", align_corners=False) / size**0.5
            size *= 4
        pixels = (total - total.mean()) / total.std() * 50 + 128
        images.append(pixels[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).contiguous())
    return images


def encode(tokenizer: VisionTokenizer, images: list[torch.Tensor]) -> tuple[np.ndarray, float]:
    """(bits of all images, seconds)."""
    begun_s = time.perf_counter()
    # The codes come back to the CPU, which waits for the device.
    codes = tokenizer.encode(images)
    return np.unpackbits(np.stack(codes)), time.perf_counter() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--weights", help="file of trained weights")
    options = parser.parse_args()
    device = torch.device(options.device)
    is_small = device.type == "cpu"
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        sizes = SMALL if is_small else {}
        weights = options.weights or str(random_weights(VisionSection(weights="", **sizes), Path(folder)))
        section = VisionSection(weights=weights, **sizes)
        side_px, number = (128, 4) if is_small else (512, 32)
        images = smooth_images(number, side_px)
        ways = {
            f"{how}, {precision}": VisionTokenizer(dataclasses.replace(section, precision=precision), device, most_px)
            for precision in PRECISIONS
            for how, most_px in (("alone", 1), ("batch", 1 << 20))
        }
    reference = None
    for name, tokenizer in ways.items():
        encode(tokenizer, images)
        bits, seconds = encode(tokenizer, images)
        reference = bits if reference is None else reference
        print(
            json.dumps(
                {
                    "way": name,
                    "images_per_s": round(number / seconds, 2),
                    "side_px": side_px,
                    "flipped": float((bits != reference).mean()),
                    "bits": bits.size,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
