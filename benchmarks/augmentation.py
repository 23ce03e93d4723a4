"""What augmented images cost: decoded and encoded in every epoch, or a few views of each encoded once (bit shards).

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/augmentation.py

Measured, on one core in processor time: JPEGs of the size of ImageNet's (500 x 375 px, synthetic) to
256 px, against ADM's own way with Pillow; drawing a view; reading a stored one. Counted: FLOPs per image of the frozen
autoencoder's encoder and of training B, L and H (`observe/cost.py`), and bytes of stored views.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.decoding import jpeg, picture
from benchmarks.packs import machine
from benchmarks.reading import best, write_shard
from bitdance_scale.config.data_schema import AugmentSection
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import ClassesSection, RunConfig
from bitdance_scale.data.augment import Augmentation, num_stored_views, stored_recipe, stored_views
from bitdance_scale.data.bit_shards import ROW, BitStore, shard_file, shard_meta, write_bit_shard, write_table
from bitdance_scale.data.image_decode import decode_image, decode_views
from bitdance_scale.data.images.resize import ResizeMethod
from bitdance_scale.data.images.views import CENTRE
from bitdance_scale.data.index.build import build_index
from bitdance_scale.observe.cost import count_pack, count_parameters, encode_flops, peak_flops, step_flops
from bitdance_scale.sequence.condition import ClassCondition
from bitdance_scale.sequence.layout import pack_samples

SIZE_PX, BUCKET_PX = (375, 500), (256, 256)
RECIPE = AugmentSection(flip=0.5, crop=1.0, crop_until_epoch=700, crop_ends_epoch=750)
NUM_CLASSES, NUM_IMAGES, TOKEN_BYTES, NUM_TOKENS = 1000, 1_281_167, 4, 256
NUM_PICTURES, NUM_STORED = 8, 2000


def adm_with_pillow(file: bytes) -> np.ndarray:
    """The centre crop as guided-diffusion makes it."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    while min(image.size) >= 2 * BUCKET_PX[0]:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = BUCKET_PX[0] / min(image.size)
    pixels = np.asarray(image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.BICUBIC))
    top, left = ((side - crop) // 2 for side, crop in zip(pixels.shape, BUCKET_PX, strict=False))
    return pixels[top : top + BUCKET_PX[0], left : left + BUCKET_PX[1]]


def bench_decoding() -> None:
    """Milliseconds per image of one core."""
    files = [jpeg(picture(SIZE_PX, seed), quality=95) for seed in range(NUM_PICTURES)]
    augmentation, views = Augmentation(RECIPE, 0), [stored_views(RECIPE, sample) for sample in range(NUM_PICTURES)]

    def decoded(method: ResizeMethod, is_crop: bool) -> Callable[[], object]:
        chosen = [augmentation.view(0, n) if is_crop else CENTRE for n in range(NUM_PICTURES)]
        return lambda: [
            decode_image(file, SIZE_PX, BUCKET_PX, None, method, view) for file, view in zip(files, chosen, strict=True)
        ]

    def all_views() -> object:
        pairs = zip(files, views, strict=True)
        return [decode_views(file, SIZE_PX, BUCKET_PX, None, "adm", wanted) for file, wanted in pairs]

    ways: dict[str, Callable[[], object]] = {"Pillow, ADM's centre": lambda: [adm_with_pillow(file) for file in files]}
    for method in ResizeMethod:
        ways |= {f"ours, {method}, centre": decoded(method, False), f"ours, {method}, crop": decoded(method, True)}
    ways[f"ours, adm, the {num_stored_views(RECIPE)} stored views of an image"] = all_views
    size_kb = sum(map(len, files)) // NUM_PICTURES // 1000
    print(f"\n| JPEG of {SIZE_PX[1]} x {SIZE_PX[0]} px, {size_kb} KB | ms per image | speed over the baseline |")
    print("|---|---|---|")
    baseline = 0.0
    for name, way in ways.items():
        spent_ms = best(way) / NUM_PICTURES * 1e3
        baseline = baseline or spent_ms
        print(f"| {name} | {spent_ms:.2f} | {baseline / spent_ms:.1f} |", flush=True)
    spent_us = best(lambda: [augmentation.view(3, sample) for sample in range(1000)]) * 1e3
    print(f"| of it, drawing the view | {spent_us / 1e3:.3f} | |")


def bench_stored() -> None:
    """Milliseconds to read one of the stored views, and what they take."""
    num_views = num_stored_views(RECIPE)
    recipe = {"num_bits": 8 * TOKEN_BYTES, "resolutions": {"256": [[256, 256]]}, "augment": stored_recipe(RECIPE)}
    numbers = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, bits = str(Path(folder) / "0.tar"), Path(folder) / "bits"
        write_shard(Path(path), [jpeg(picture((16, 16), 0), 90)] * NUM_STORED, (16, 16))
        index = build_index([path], Path(folder) / "index")
        contents = [numbers.bytes(TOKEN_BYTES * NUM_TOKENS) for _ in range(NUM_STORED * num_views)]
        write_bit_shard(bits / shard_file(0), shard_meta(index, 0, recipe), {256: contents})
        write_table(bits, index, recipe)
        store, augmentation = BitStore(bits, index, recipe), Augmentation(RECIPE, 0)
        order = numbers.permutation(NUM_STORED).tolist()
        spent_s = best(lambda: [store.read(n, 256, augmentation.stored_view(1, n)) for n in order])
        store.close()
    print(f"| ours, one of {num_views} stored views drawn and read | {spent_s / NUM_STORED * 1e3:.3f} | |")
    data_gb = NUM_IMAGES * num_views * TOKEN_BYTES * NUM_TOKENS / 1e9
    table_gb = NUM_IMAGES * num_views * ROW.itemsize / 1e9
    print(f"\nstored views of {NUM_IMAGES:,} images: {data_gb:.1f} GB of bits, {table_gb:.2f} GB of tables")


def class_config(preset: str, block_side: int) -> RunConfig:
    """A network of the table, with the release's four draws per block."""
    config = load_config(
        "pt_14b",
        [
            *(f"model.preset={preset}", "text.path=''", "text.kind=sentencepiece", "head.diff_batch_mul=4"),
            f"vision.block_side={block_side}",
        ],
    )
    return dataclasses.replace(config, classes=ClassesSection(num_classes=NUM_CLASSES))


def count() -> None:
    """FLOPs per image of the encoder and of training."""
    peaks = [peak_flops("NVIDIA H100", dtype) or float("nan") for dtype in ("float32", "bfloat16", "bfloat16")]
    print("\n| network | parameters, M | GFLOP per image: encoder, forward | training | encoder over training ", end="")
    print("| ms at the peak of an H100: encoder in float32 | in bfloat16 | training in bfloat16 |\n" + "|---" * 8 + "|")
    for preset in ("bitdance-b", "bitdance-l", "bitdance-h"):
        for block_side in (1, 2, 4):
            config = class_config(preset, block_side)
            condition = ClassCondition(config.classes, config.vision.block_tokens, is_causal=False)
            sample = condition.drawing_sample(0, "0", config.classes.grid, is_caption_dropped=False)
            counts = count_pack(pack_samples([sample], condition.image_tokens, 1))
            training = step_flops(config, condition.vocab_size, counts).training
            encoder = encode_flops(config.vision, NUM_TOKENS)
            size = count_parameters(config, condition.vocab_size)["total"] / 1e6
            times = zip((encoder, encoder, training), peaks, strict=True)
            shown = " | ".join(f"{flops / peak * 1e3:.2f}" for flops, peak in times)
            name, ratio = f"{preset[-1].upper()}-{block_side**2}x", encoder / training
            print(f"| {name} | {size:.0f} | {encoder / 1e9:.0f} | {training / 1e9:.0f} | {ratio:.2f} | {shown} |")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(machine())
    bench_decoding()
    bench_stored()
    count()


if __name__ == "__main__":
    main()
