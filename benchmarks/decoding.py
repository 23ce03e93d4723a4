"""Decoding JPEGs to the pixels of their buckets, against webdataset with Pillow in the same run; prints tables.

    python benchmarks/decoding.py                          # synthetic pictures
    python benchmarks/decoding.py --photographs FOLDER     # and the pictures of a folder

Speed: 1024 px JPEGs to 512 px from a tar. One core is measured in processor time, so that other programs on the machine
count less; two threads are measured by the clock, the best of several runs. Quality: PSNR against the picture before
compression, resized with Lanczos, at ratios from 1.3 to 4. Photographs are cropped to sides that are multiples of 8, so
that all regions are whole.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from benchmarks.reading import SMALL_PX, best, row, write_shard
from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.resize import ResizeMethod
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.reader import ShardReader

LARGE_PX = (1024, 1024)
NUM_PICTURES = 8
RATIOS = (4 / 3, 2.0, 8 / 3, 4.0)


def picture(size_px: tuple[int, int], seed: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, about as in photographs."""
    numbers = np.random.default_rng(seed)
    height, width = size_px
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(size_px)) ** 1.5
    shape = amplitude.shape
    planes = [np.fft.irfft2(amplitude * np.exp(2j * np.pi * numbers.random(shape)), s=size_px) for _ in range(3)]
    pixels = np.stack(planes, axis=-1)
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The picture as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - expected.astype(float)).mean()))


def resized(image: Image.Image, size_px: tuple[int, int], filtering: Image.Resampling) -> np.ndarray:
    """uint8 [height, width, 3], by Pillow."""
    return np.asarray(image.convert("RGB").resize(size_px[::-1], filtering))


def bench_speed(pictures: Sequence[Image.Image], num_images: int, title: str) -> None:
    """Images per second of one core and of two threads."""
    files = [jpeg(image.resize(LARGE_PX, Image.Resampling.LANCZOS), quality=90) for image in pictures]
    mean_bytes = sum(map(len, files)) // len(files)
    print(f"\n| {title}, {mean_bytes // 1000} KB each | images/s/core | over the baseline |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "0.tar")
        write_shard(Path(path), [files[number % len(files)] for number in range(num_images)], LARGE_PX)
        index, reader = build_index([path], Path(folder) / "index"), ShardReader()

        def with_webdataset() -> None:
            for sample in webdataset.WebDataset(path, shardshuffle=False):
                resized(Image.open(io.BytesIO(sample["jpg"])), SMALL_PX, Image.Resampling.LANCZOS)

        def ours(sample: int, method: ResizeMethod) -> np.ndarray:
            return decode_image(reader.image(index, sample), LARGE_PX, SMALL_PX, None, method)

        def alone(method: ResizeMethod) -> None:
            for sample in range(num_images):
                ours(sample, method)

        def two_threads(method: ResizeMethod) -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda sample: ours(sample, method), range(num_images)))

        baseline = num_images / best(with_webdataset)
        row("webdataset and Pillow: whole decode, Lanczos", baseline, "", baseline)
        for method in ResizeMethod:
            row(f'ours, "{method}"', num_images / best(lambda m=method: alone(m)), "", baseline)
        checksums = num_images / best(lambda: [checksum32(files[n % len(files)]) for n in range(num_images)])
        sharp = num_images / best(lambda: alone(ResizeMethod.SHARP))
        print(f"| the checksum alone, and its share of sharp | {checksums:,.0f} | {sharp / checksums:.2%} |")
        for method in ResizeMethod:
            runs = [lambda m=method: alone(m), lambda m=method: two_threads(m)]
            one, two = (num_images / best(run, time.monotonic) for run in runs)
            print(f'| ours, "{method}", two threads over one, by the clock | {two:,.0f} | {two / one:.2f} |')


def bench_quality(pictures: dict[str, Image.Image], quality: int) -> None:
    """PSNR of every picture at every ratio, and the mean over the pictures."""
    print(f"\n| PSNR in dB, quality {quality} | ratio | Pillow, Lanczos | Pillow, bicubic | sharp | fast | adm |")
    print("|---|---|---|---|---|---|---|")
    for ratio in RATIOS:
        rows = {}
        for name, image in pictures.items():
            size_px = image.height, image.width
            bucket_px = round(image.height / ratio), round(image.width / ratio)
            truth = resized(image, bucket_px, Image.Resampling.LANCZOS)
            file = jpeg(image, quality)
            whole = Image.open(io.BytesIO(file))
            found = [resized(whole, bucket_px, kind) for kind in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)]
            found += [decode_image(file, size_px, bucket_px, None, method) for method in ResizeMethod]
            rows[name] = [decibels(pixels, truth) for pixels in found]
        for name, row_db in (rows | {"mean": np.mean(list(rows.values()), axis=0)}).items():
            print(f"| {name} | {ratio:.2f} | " + " | ".join(f"{value:.1f}" for value in row_db) + " |")


def load_photographs(folder: Path) -> dict[str, Image.Image]:
    """Name -> picture, cropped so that every ratio of `RATIOS` gives whole buckets of the same aspect."""
    found = {}
    for path in sorted(folder.iterdir()):
        image = Image.open(path).convert("RGB")
        found[path.stem] = image.crop((0, 0, image.width // 8 * 8, image.height // 8 * 8))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder of pictures, best ones without losses")
    parser.add_argument("--samples", type=int, default=64, help="images of the tar")
    options = parser.parse_args()
    synthetic = {f"noise {seed}": picture(LARGE_PX, seed) for seed in range(NUM_PICTURES)}
    bench_speed(list(synthetic.values()), options.samples, "synthetic")
    photographs = load_photographs(options.photographs) if options.photographs else {}
    if photographs:
        bench_speed(list(photographs.values()), options.samples, "photographs")
    for quality in (75, 95):
        for pictures in filter(None, (synthetic, photographs)):
            bench_quality(pictures, quality)


if __name__ == "__main__":
    main()
