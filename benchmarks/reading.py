"""Indexing and S3, each against a baseline in the same run; prints the rows of a table.

    python benchmarks/reading.py index     # against tarfile, and webdataset's stream
    python benchmarks/reading.py s3        # one percent of broken requests against none; needs the test extras

Shards are synthetic: records as img2dataset writes them. Indexing is measured in processor time, so that other programs
on the machine count less. Decoding has a benchmark of its own, decoding.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.tar_scan import TarScan
from bitdance_scale.data.storage.s3 import S3Store
from bitdance_scale.data.storage.stores import Stores

ROOT = Path(__file__).parents[1]
SMALL_PX = (512, 512)
REPEATS = 5


def write_shard(path: Path, images: Sequence[bytes], size_px: tuple[int, int]) -> None:
    """Writes samples as img2dataset does, one per image."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, image in enumerate(images):
            caption = f"a photograph of something, number {number}, seen on a rainy day in the north"
            record = {
                "url": f"https://example.com/images/{number:09d}.jpg",
                "caption": caption,
                "key": f"{number:09d}",
                "status": "success",
                "error_message": None,
                "width": size_px[1],
                "height": size_px[0],
                "original_width": 2 * size_px[1],
                "original_height": 2 * size_px[0],
                "exif": "{}",
                "sha256": "0123456789abcdef" * 4,
                "punsafe": 0.01 * (number % 100),
                "pwatermark": 0.2,
                "similarity": 0.31,
            }
            members = {"jpg": image, "txt": caption.encode(), "json": json.dumps(record).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def best(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(REPEATS):
        begun = clock()
        function()
        times.append(clock() - begun)
    return min(times)


def row(name: str, value: float, unit: str, baseline: float) -> None:
    """One line of a table."""
    print(f"| {name} | {value:,.0f} {unit} | {value / baseline:.2f} |", flush=True)


def bench_index(folder: Path, num_samples: int) -> None:
    """Members per second of one core, pages warm: headers alone, and the whole index."""
    numbers = np.random.default_rng(0)
    write_shard(
        folder / "0.tar", [numbers.bytes(int(numbers.integers(5000, 20000))) for _ in range(num_samples)], SMALL_PX
    )
    path, members = str(folder / "0.tar"), 3 * num_samples
    total_bytes = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)

    def headers() -> None:
        for _ in TarScan(lambda offset, num_bytes: os.pread(descriptor, num_bytes, offset), total_bytes):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as index_dir:
            assert len(build_index([path], index_dir, num_workers=1)) == num_samples

    def with_tarfile() -> None:
        with tarfile.open(path) as tar:
            assert sum(1 for _ in tar) == members

    def with_webdataset() -> None:
        data = webdataset.WebDataset(path, shardshuffle=False)
        assert sum(1 for sample in data if json.loads(sample["json"])["width"]) == num_samples

    rates = [members / best(function) for function in (with_tarfile, with_webdataset, headers, whole)]
    names = ("tarfile, headers alone", "webdataset, with the records", "ours, headers alone", "ours, the whole index")
    for name, rate in zip(names, rates, strict=True):
        row(name, rate, "members/s/core", rates[1] if "whole" in name or "webdataset" in name else rates[0])


def bench_s3(folder: Path, num_samples: int) -> None:
    """Samples per second through a proxy that breaks 1 % of requests, and from the cache; baseline: none broken."""
    import boto3

    sys.path.insert(0, str(ROOT))
    from tests.s3_server import CREDENTIALS, FaultInjector, s3_server

    os.environ |= CREDENTIALS
    numbers = np.random.default_rng(0)
    files = [numbers.bytes(100_000) for _ in range(200)]
    write_shard(folder / "0.tar", files, SMALL_PX)
    with s3_server() as url, FaultInjector(url) as injector:
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="images")
        client.upload_file(str(folder / "0.tar"), "images", "0.tar")
        section = S3Section(endpoint_url=injector.url)
        index = build_index(["s3://images/0.tar"], folder / "index", stores=Stores(section))
        store = S3Store(section)
        order = numbers.integers(len(index), size=num_samples)
        rates = {}
        for _ in range(2):
            for share in (0.0, 0.01):
                injector.share = share
                rates[share] = max(rates.get(share, 0.0), _read_all(store, index, order, files))
        cached = S3Store(dataclasses.replace(section, cache_dir=str(folder / "cache")))
        filling, filled = (_read_all(cached, index, order, files) for _ in range(2))
    row("no faults", rates[0.0], "samples/s", rates[0.0])
    row("1 % of requests broken", rates[0.01], "samples/s", rates[0.0])
    row("cache, while it fills", filling, "samples/s", rates[0.0])
    row("cache, filled", filled, "samples/s", rates[0.0])
    print(f"broken: {dict(injector.counts)}; repeated: {store.num_retries}; all samples intact")


def _read_all(store: S3Store, index: Index, order: np.ndarray, files: Sequence[bytes]) -> float:
    def read(sample: int) -> bytes:
        offset, num_bytes = index.place(sample).offset, index.place(sample).num_bytes
        return store.read("s3://images/0.tar", offset, num_bytes, index.shards[0].tag)

    begun = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, order.tolist()))
    elapsed = time.monotonic() - begun
    assert all(content == files[sample] for content, sample in zip(found, order.tolist(), strict=True))
    return len(order) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("index", "s3"))
    parser.add_argument("--samples", type=int, help="default: 20000 and 1500")
    options = parser.parse_args()
    print("| what | rate | over the baseline |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        match options.what:
            case "index":
                bench_index(Path(folder), options.samples or 20000)
            case "s3":
                bench_s3(Path(folder), options.samples or 1500)


if __name__ == "__main__":
    main()
