"""What an index of many samples costs: its files, the start of a run, captions of a batch, one changed shard.

    python benchmarks/scale.py --samples 10000000 [--folder FOLDER]

The samples are synthetic: sides as of photographs, captions of about 70 bytes, eight scores, shards of 10,000. No tars
are read: their parts are made directly, and joined, opened and drawn from by the code of a run. Reads from the disk are
counted by the system, with the pages of the index dropped before. With --samples 100000000, 13 GB are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from packs import machine

from bitdance_scale.config.data_schema import DataFilter, DataSection
from bitdance_scale.config.load import load_config
from bitdance_scale.data.index import build
from bitdance_scale.data.index.column_file import write_columns
from bitdance_scale.data.index.index import Index, ShardEntry, open_index, read_table, table_paths
from bitdance_scale.data.index.known_shards import KnownShard, earlier_shards, version_of
from bitdance_scale.data.index.segment import GROUP, Piece, text_columns
from bitdance_scale.data.index.shard_scan import shard_digests
from bitdance_scale.data.plan.buckets import EligibleSamples, assign_buckets, resolution_buckets
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.plan.selection import SAMPLES_PER_CHUNK, store_selection

NUM_TEMPLATES = 8
SCORES = ("punsafe", "pwatermark", "similarity", "aesthetic", "clip", "nsfw", "text_area", "blur")
MAX_OPEN_FILES = 1024


def template(folder: Path, number: int, count: int) -> KnownShard:
    """The part of one synthetic shard."""
    numbers = np.random.default_rng(number)
    short = numbers.integers(200, 1600, count)
    aspect = np.exp(np.abs(numbers.normal(0, 0.35, count)))
    size = np.stack([short, np.minimum(short * aspect, 6000).astype(np.int64)], axis=1)
    size[::2] = size[::2, ::-1]
    num_bytes = numbers.integers(20_000, 300_000, count)
    blocks = np.cumsum(3 + num_bytes // 512)
    columns: dict[str, np.ndarray] = {
        "place": np.stack([blocks, num_bytes, numbers.integers(0, 1 << 32, count)], axis=1).astype(np.uint32),
        "size_px": size.astype(np.uint16),
        "original_px": (2 * size).astype(np.uint16),
    }
    lengths, usable = numbers.integers(20, 120, count), np.zeros(count, np.uint8)
    columns |= text_columns("name", np.full(count, 9), usable, b"".join(b"%09d" % n for n in range(count)))
    columns |= text_columns("caption.caption", lengths, usable, (b"a photograph of something " * 8)[:120] * count)
    columns["caption.caption.text"] = columns["caption.caption.text"][: lengths.sum()]
    columns |= {f"score.{field}": numbers.random(count).astype(np.float32) for field in SCORES}
    digests = shard_digests(columns)
    path = folder / f"template_{number}.safetensors"
    write_columns(path, columns, {"shards": [digests]})
    return KnownShard(ShardEntry("", 0, "", count, {}), Piece(path, 0, count), digests)


def synthetic_shards(folder: Path, count: int, shard_samples: int) -> list[KnownShard]:
    """So many shards, whose samples are those of a few templates."""
    templates = [template(folder, number, shard_samples) for number in range(NUM_TEMPLATES)]
    found = []
    for number in range(count):
        known = templates[number % NUM_TEMPLATES]
        entry = dataclasses.replace(known.entry, path=f"/shards/{number:06d}.tar", num_bytes=1 << 30, tag=str(number))
        found.append(dataclasses.replace(known, entry=entry))
    return found


def seconds(function: Callable[[], object]) -> float:
    """By the clock."""
    begun = time.monotonic()
    function()
    return time.monotonic() - begun


def drop_pages(folder: Path) -> None:
    """Drops the pages of an index from memory."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_bytes() -> int:
    """Bytes that this process has made the system read from a disk."""
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def row(name: str, value: str) -> None:
    """One line of the table."""
    print(f"| {name} | {value} |", flush=True)


def bench_build(folder: Path, shards: list[KnownShard]) -> Path:
    """Joining all parts; returns the table."""
    index_dir, num_samples = folder / "index", sum(shard.entry.num_samples for shard in shards)
    elapsed = seconds(lambda: build.write_index(shards, ["caption"], index_dir, [], 1))
    (table,) = table_paths(index_dir)
    text = text_bytes(table)
    # Of equal segments, which only synthetic data have, there is one file.
    segments = read_table(table).segments
    size = sum(segment.num_bytes for segment in segments)
    row("joining the parts, one process", f"{elapsed:.1f} s, {num_samples / elapsed / 1e6:.1f} M samples/s")
    row("on the disk, without the texts of captions", f"{(size - text) / num_samples:.1f} bytes a sample")
    row("on the disk, all", f"{size / num_samples:.1f} bytes a sample in {len(segments)} segments")
    return table


def text_bytes(table: Path) -> int:
    """Bytes of all captions."""
    index = open_index(table)
    return sum(len(segment.columns["caption.caption.text"]) for segment in index.segments)


def bench_change(folder: Path, path: Path, shards: list[KnownShard]) -> None:
    """Another tar takes the place of one in the middle."""
    index_dir, table = path.parent, read_table(path)
    versions = [version_of(entry) for entry in table.shards]
    usable = earlier_shards(index_dir, [table], versions, ["caption"]).usable
    known = [usable[version] for version in versions]
    middle = len(known) // 2
    changed = template(folder, NUM_TEMPLATES, shards[middle].entry.num_samples)
    known[middle] = dataclasses.replace(changed, entry=dataclasses.replace(shards[middle].entry, tag="changed"))
    before = {path.name for path in index_dir.glob("segment_*")}
    elapsed = seconds(lambda: build.write_index(known, ["caption"], index_dir, table.segments, 1))
    written = [path for path in index_dir.glob("segment_*") if path.name not in before]
    num_bytes = sum(path.stat().st_size for path in written)
    row(f"one changed shard of {len(shards):,}", f"{elapsed:.1f} s, {len(written)} file of {num_bytes / 1e6:,.0f} MB")


def bench_start(table: Path, data: DataSection) -> Index:
    """Selecting the samples of all streams, and what every rank does."""
    drop_pages(table.parent)
    index = open_index(table)
    count = len(index)
    cold = seconds(lambda: store_selection(index, data))
    for path in table.parent.glob("selection_*"):
        path.unlink()
    warm = seconds(lambda: store_selection(index, data))
    every = seconds(lambda: Plan(0, open_index(table, is_verified=True), data))
    buckets = [resolution_buckets(resolution) for resolution in data.resolutions]

    def one_by_one() -> None:
        """As every rank did before: the bucket of each sample, in floating point."""
        for own in buckets:
            chunks = []
            for start in range(0, count, SAMPLES_PER_CHUNK):
                height, width = index.sizes_px(slice(start, min(start + SAMPLES_PER_CHUNK, count))).T
                chunks.append(np.packbits(assign_buckets(height, width, own, data.max_upscale) >= 0))
            EligibleSamples.of_bits(np.concatenate(chunks))

    baseline = seconds(one_by_one) if count <= 20_000_000 else None
    row("selecting the samples, once per data set, pages cold", f"{cold:.2f} s, {1e9 * cold / count:.1f} ns a sample")
    row("selecting the samples, pages warm", f"{warm:.2f} s, {1e9 * warm / count:.1f} ns a sample")
    if baseline is not None:
        row("before: in every rank", f"{baseline:.2f} s, {1e9 * baseline / count:.0f} ns a sample")
    row("start of a rank: opening the index and `Plan()`", f"{every:.2f} s")
    return index


def bench_captions(table: Path, data: DataSection) -> None:
    """Bytes read from the disk for the captions of one batch."""
    plan = Plan(0, open_index(table, is_verified=True), data)
    samples = plan.batch(0).samples
    drop_pages(table.parent)
    index = open_index(table, is_verified=True)
    begun_bytes, begun = read_bytes(), time.monotonic()
    texts = index.texts("caption", samples)
    elapsed, found = time.monotonic() - begun, read_bytes() - begun_bytes
    useful = sum(len(text.encode()) for alternatives in texts for text in alternatives)
    row("captions of a batch, pages cold", f"{found / 1e6:.1f} MB read for {useful / 1e3:.0f} kB, {elapsed:.2f} s")
    # Other maps of the same files, as numpy makes them: the system reads ahead.
    del index, plan
    drop_pages(table.parent)
    begun_bytes, begun = read_bytes(), time.monotonic()
    read_with_numpy(table, samples)
    elapsed, found = time.monotonic() - begun, read_bytes() - begun_bytes
    row("before: with the system's read-ahead", f"{found / 1e6:,.1f} MB read, {elapsed:.2f} s")


def read_with_numpy(table: Path, samples: np.ndarray) -> None:
    """The starts and texts of captions in the order of the batch, from maps without advice."""
    entries = read_table(table).segments
    begins = np.cumsum([0, *(entry.num_samples for entry in entries)])
    maps = []
    for entry in entries:
        with open(table.parent / entry.file, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        columns = []
        for part, dtype in (("base", np.int64), ("start", np.uint32), ("text", np.uint8)):
            begin, end = header[f"caption.caption.{part}"]["data_offsets"]
            shape = (end - begin) // np.dtype(dtype).itemsize
            columns.append(np.memmap(table.parent / entry.file, dtype, "r", 8 + length + begin, shape))
        maps.append(columns)
    for sample in samples.tolist():
        number = int(np.searchsorted(begins, sample, side="right")) - 1
        base, start, text = maps[number]
        row = sample - int(begins[number])
        begin, end = (int(base[r // GROUP]) + int(start[r]) for r in (row, row + 1))
        assert len(text[begin:end].tobytes()) == end - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--shard-samples", type=int, default=10_000, help="samples of a shard (default: 10000)")
    parser.add_argument("--folder", help="where the index is written; default: the folder for temporary files")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    print(machine())
    print(f"{options.samples:,} samples; at most {MAX_OPEN_FILES} open files\n\n| what | value |\n|---|---|")
    data = dataclasses.replace(
        load_config("pt_14b", []).data,
        filters=(DataFilter(column="punsafe", max=0.9), DataFilter(column="aesthetic", min=0.1)),
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shards = synthetic_shards(Path(folder), options.samples // options.shard_samples, options.shard_samples)
        table = bench_build(Path(folder), shards)
        bench_start(table, data)
        bench_captions(table, data)
        bench_change(Path(folder), table, shards)


if __name__ == "__main__":
    main()
