"""Reading of vision tokens that were encoded ahead of training, against webdataset; prints the rows of a table.

    python benchmarks/bit_shards.py [--samples 4000] [--before CHECKOUT]

Bits of 256, 512 and 1024 px are read sample by sample in random order, and their checksums compared. webdataset
streams the same bytes in file order, one member a sample. All pages are in memory. Rates are of processor time, so that
other programs on the machine count less; the ways take turns, and the best of several rounds counts. With `--before`,
bit shards of another version are written and read beside ours, from the root of a checkout of that version. The last
row has more shards than may be open at a time, so that most reads open one.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import webdataset
from packs import machine, module_before
from reading import SMALL_PX, write_shard

from bitdance_scale.data import bit_shards
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index

TOKENS = {256: 256, 512: 1024, 1024: 4096}
NUM_BITS = 32
ROUNDS = 7
NUM_SHARDS = 2 * bit_shards.MAX_OPEN_SHARDS


class IndexBefore:
    """The columns of an index as version 0.2.0 named them, which its bit shards read."""

    def __init__(self, index: Index) -> None:
        self.hash, self.shards, self.name, self.shard_path = index.hash, index.shards, index.name, index.shard_path
        self.shard = np.repeat(np.arange(len(index.shards)), [entry.num_samples for entry in index.shards])
        self.image_offset, self.image_bytes, self.header_crc = index.places(slice(None)).T
        self.height_px, self.width_px = index.sizes_px(slice(None)).T

    def __len__(self) -> int:
        return len(self.shard)


def rates(ways: dict[str, Callable[[], object]], num_samples: int) -> dict[str, float]:
    """Samples per second of processor time, the best of several rounds in which the ways take turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            seconds[name] = min(seconds[name], time.process_time() - begun)
    return {name: num_samples / spent for name, spent in seconds.items()}


def show(what: str, found: dict[str, float]) -> None:
    """A line of a table for every way; the first one is the baseline."""
    for name, rate in found.items():
        print(f"| {what}, {name} | {rate:,.0f} | {rate / next(iter(found.values())):.1f} |", flush=True)


def written(module: ModuleType, folder: Path, index: Index, contents: dict[int, list[bytes]]) -> bit_shards.BitStore:
    """The bits as a version stores them, in as many bit shards as the index has shards."""
    buckets = {str(side_px): [[side_px, side_px]] for side_px in contents}
    # Older versions have the resolutions under another name.
    recipe = {"num_bits": NUM_BITS, "resolutions": buckets, "classes": buckets}
    # 0.2.0 had another index.
    given = index if module is bit_shards else IndexBefore(index)
    for row in range(len(index.shards)):
        samples = index.shard_samples(row)
        parts = {side_px: all_bits[samples.start : samples.stop] for side_px, all_bits in contents.items()}
        module.write_bit_shard(folder / module.shard_file(row), module.shard_meta(given, row, recipe), parts)
    module.write_table(folder, given, recipe)
    return module.BitStore(folder, given, recipe)


def bench_resolutions(folder: Path, num_samples: int, modules: dict[str, ModuleType]) -> None:
    """One bit shard, every resolution."""
    numbers = np.random.default_rng(0)
    write_shard(folder / "0.tar", [b"x"] * num_samples, SMALL_PX)
    index = build_index([str(folder / "0.tar")], folder / "index")
    contents = {
        side_px: [numbers.bytes(count * NUM_BITS // 8) for _ in range(num_samples)] for side_px, count in TOKENS.items()
    }
    stores = {name: written(module, folder / name, index, contents) for name, module in modules.items()}
    order = numbers.permutation(num_samples).tolist()
    for side_px, count in TOKENS.items():
        with tarfile.open(folder / "samples.tar", "w") as tar:
            for number, content in enumerate(contents[side_px]):
                info = tarfile.TarInfo(f"{number:06d}.bits")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

        def with_webdataset(num_bytes: int = count * NUM_BITS // 8 * num_samples) -> None:
            data = webdataset.WebDataset(str(folder / "samples.tar"), shardshuffle=False)
            assert sum(len(sample["bits"]) for sample in data) == num_bytes

        ways: dict[str, Callable[[], object]] = {"webdataset": with_webdataset}
        for name, store in stores.items():

            def read(store: bit_shards.BitStore = store, side_px: int = side_px, count: int = count) -> None:
                for sample in order:
                    assert len(store.read(sample, side_px)) == count

            ways[name] = read
        show(f"{side_px} px", rates(ways, num_samples))


def bench_many_shards(folder: Path, modules: dict[str, ModuleType]) -> None:
    """More shards than may be open, eight samples each."""
    numbers = np.random.default_rng(0)
    for number in range(NUM_SHARDS):
        write_shard(folder / f"{number:05d}.tar", [b"x"] * 8, SMALL_PX)
    index = build_index(sorted(map(str, folder.glob("*.tar"))), folder / "index")
    contents = {512: [numbers.bytes(1024 * NUM_BITS // 8) for _ in range(len(index))]}
    order = numbers.permutation(len(index)).tolist()
    ways: dict[str, Callable[[], object]] = {}
    for name, module in modules.items():
        store = written(module, folder / name, index, contents)
        ways[name] = lambda store=store: [store.read(sample, 512) for sample in order]
    show(f"512 px from {NUM_SHARDS} shards", rates(ways, len(index)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--before", metavar="CHECKOUT", help="another version to compare with")
    options = parser.parse_args()
    print(machine())
    modules = ({"before": module_before(options.before, "data/bit_shards.py")} if options.before else {}) | {
        "ours": bit_shards
    }
    print("| what | samples/s/core | over the first |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench_resolutions(Path(folder), options.samples, modules)
    with tempfile.TemporaryDirectory() as folder:
        bench_many_shards(Path(folder), modules)


if __name__ == "__main__":
    main()
