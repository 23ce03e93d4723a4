"""What a user is shown of a visual tokenizer: originals over reconstructions, and the time per image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bitdance_scale.errors import ConfigError
from bitdance_scale.train.tokenizer_evaluation import Reconstruction, to_pixels
from bitdance_scale.vision.autoencoder import Autoencoder, published_sizes
from bitdance_scale.vision.weights import CONFIG_NAME, WEIGHTS_NAME, config_beside, load_weights
from bitdance_scale.weight_files import read_json

TILE_PX = 112
NUM_COLUMNS = 10
CODE_BITS = 8


def load_autoencoder(where: str | Path) -> Autoencoder:
    """The network of a weights file, or of a folder with `ae.safetensors`, on the CPU in float32.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: they are damaged, or do not fit the configuration beside them (`config_beside`).
    """
    where = Path(where)
    weights = where / WEIGHTS_NAME if where.is_dir() else where
    if not weights.is_file():
        raise ConfigError(
            f"{weights}: no such file; name a folder with {WEIGHTS_NAME} and {CONFIG_NAME}, or a weights file"
        )
    config = config_beside(weights)
    autoencoder = Autoencoder(**published_sizes(read_json(config), str(config)))
    autoencoder.load_state_dict(load_weights(weights, autoencoder.state_dict()))
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
