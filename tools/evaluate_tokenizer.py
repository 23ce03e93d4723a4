"""Measures a visual tokenizer on images it was not trained on, and draws originals over reconstructions.

    python tools/evaluate_tokenizer.py bitdance_scale/assets/demo data/tokenizer_held_out --sizes 32 64 128 --picture out.png

Prints a markdown table: PSNR with and without 1% of flipped bits, and how the bits are used; then the time per image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bitdance_scale.data.crop_stream import centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.train.tokenizer_evaluation import Reconstruction, evaluate, summary, to_pixels
from bitdance_scale.vision.autoencoder import Autoencoder, published_sizes
from bitdance_scale.vision.weights import CONFIG_NAME, WEIGHTS_NAME, load_weights

TILE_PX = 112
NUM_COLUMNS = 10
CODE_BITS = 8


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The network of a folder with `ae.safetensors` and `ae_config.json`, on the CPU in float32."""
    config_path = Path(folder) / CONFIG_NAME
    if not config_path.is_file():
        raise ConfigError(f"{config_path}: no such file; name a folder with {WEIGHTS_NAME} and {CONFIG_NAME}")
    autoencoder = Autoencoder(**published_sizes(json.loads(config_path.read_text(encoding="utf-8"))))
    autoencoder.load_state_dict(load_weights(Path(folder) / WEIGHTS_NAME, autoencoder.state_dict()))
    return autoencoder.eval()


def draw(images: Mapping[int, np.ndarray], results: Mapping[int, Reconstruction]) -> Image.Image:
    """Two rows per size: originals, and below them what the bits give back; enlarged without smoothing."""
    label_px, gap_px = 74, 6
    picture = Image.new(
        "RGB", (label_px + NUM_COLUMNS * (TILE_PX + 2), len(images) * (2 * TILE_PX + 2 + gap_px)), "white"
    )
    pen = ImageDraw.Draw(picture)
    for row, (size, originals) in enumerate(images.items()):
        top = row * (2 * TILE_PX + 2 + gap_px)
        for line, (name, tiles) in enumerate(
            (("original", originals), (f"{results[size].psnr_db:.1f} dB", results[size].decoded))
        ):
            y = top + line * (TILE_PX + 2)
            pen.text((4, y + TILE_PX // 2 - 8), f"{size} px\n{name}", "black")
            for column, tile in enumerate(tiles[:NUM_COLUMNS]):
                enlarged = Image.fromarray(tile).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
                picture.paste(enlarged, (label_px + column * (TILE_PX + 2), y))
    return picture


def milliseconds_per_image(autoencoder: Autoencoder, images: np.ndarray) -> tuple[float, float]:
    """(encode, decode) of one image at a time, the median over at most 32 images."""
    encode_s, decode_s = [], []
    with torch.inference_mode():
        for image in images[:32]:
            pixels = to_pixels(image[None], torch.device("cpu"))
            start = time.perf_counter()
            bits = autoencoder.encode(pixels)
            middle = time.perf_counter()
            autoencoder.decode(bits)
            encode_s.append(middle - start)
            decode_s.append(time.perf_counter() - middle)
    return 1000 * float(np.median(encode_s)), 1000 * float(np.median(decode_s))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measures a visual tokenizer on held-out images.")
    parser.add_argument("folder", help=f"folder with {WEIGHTS_NAME} and {CONFIG_NAME}")
    parser.add_argument("shards", nargs="+", help="WebDataset tars of held-out images: files, folders, globs")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64, 128], help="sides of square crops in px (default: 32 64 128)"
    )
    parser.add_argument("--images", type=int, default=256, help="images per size (default: %(default)s)")
    parser.add_argument("--picture", help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        autoencoder = load_autoencoder(options.folder)
        shards = expand_shards(options.shards)
        index = build_index(shards, default_index_dir(shards))
        images = {size: centre_crops(index, (size, size), options.images) for size in options.sizes}
    except BitDanceError as error:
        print(f"evaluate_tokenizer: {error}", file=sys.stderr)
        return 1
    num_groups = autoencoder.encoder.conv_out.out_channels // CODE_BITS
    results = {size: evaluate(autoencoder, images[size], num_groups, torch.device("cpu")) for size in images}
    print(summary({(size, size): result for size, result in results.items()}))
    for size in images:
        encode_ms, decode_ms = milliseconds_per_image(autoencoder, images[size])
        print(f"{size} px: encode {encode_ms:.1f} ms, decode {decode_ms:.1f} ms on {torch.get_num_threads()} thread(s)")
    if options.picture:
        draw(images, results).save(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
