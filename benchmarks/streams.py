"""Steps out of an index and out of streams of the same tars, in one run; prints the rows of a table.

    python benchmarks/streams.py                # files, a command and HTTP, against the index; by the clock
    python benchmarks/streams.py --samples 2000 --threads 4

Both loaders do all that a run asks of them: captions, packs, strict decoding. Shards are those of reading.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.reading import jpeg, picture, row, write_shard
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.stream import StreamLoader
from bitdance_scale.sequence.tokens import load_text_tokenizer

NUM_SHARDS = 4
SIZE_PX = (512, 512)
REPEATS = 3
# What is read ahead at the start must not count.
WARM_UP_STEPS = 2


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None:
        # A loader that is closed leaves its request.
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A web server of a folder; yields its address."""
    server = QuietServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def rate(loader: Loader | StreamLoader, num_steps: int) -> float:
    """Samples per second by the clock, after the first steps."""
    with loader:
        for _ in range(WARM_UP_STEPS):
            loader.next_step()
        begun_s = time.monotonic()
        num_samples = sum(len(pack.images) for _ in range(num_steps) for pack in loader.next_step().packs)
        return num_samples / (time.monotonic() - begun_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="samples in the tars (default: 1000)")
    parser.add_argument("--threads", type=int, default=2, help="data.read_threads (default: 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [jpeg(picture(SIZE_PX, seed), quality=90) for seed in range(8)]
        per_shard = options.samples // NUM_SHARDS
        for number in range(NUM_SHARDS):
            write_shard(folder / f"{number}.tar", [images[n % 8] for n in range(per_shard)], SIZE_PX)
        with serving(folder) as address:
            measure(folder, address, options.samples, options.threads)


def measure(folder: Path, address: str, num_samples: int, num_threads: int) -> None:
    """Prints the rows."""
    shards = {
        "index": f"{folder}",
        "stream, files": f"{folder}",
        "stream, `pipe:cat`": f"pipe:cat {folder}/{{0..{NUM_SHARDS - 1}}}.tar",
        "stream, http through curl": f"{address}/{{0..{NUM_SHARDS - 1}}}.tar",
    }
    overrides = [f"data.read_threads={num_threads}", "data.global_batch=50", "data.stream_buffer=100"]
    config = load_config("demo", overrides)
    text = load_text_tokenizer(config.text, config.vision.block_tokens)

    def loader(kind: str) -> Loader | StreamLoader:
        data = dataclasses.replace(config.data, shards=(shards[kind],), mode="indexed" if kind == "index" else "stream")
        run: RunConfig = dataclasses.replace(config, data=data)
        if kind != "index":
            return StreamLoader(run, text, 0, 1)
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        return Loader(run, text, build_index(paths, folder / "index"), 0, 1)

    loader("index").close()
    num_steps = num_samples // config.data.global_batch
    rates = {kind: max(rate(loader(kind), num_steps) for _ in range(REPEATS)) for kind in shards}
    print("| what | rate | over the index |\n|---|---|---|")
    for kind, value in rates.items():
        row(kind, value, "samples/s", rates["index"])


if __name__ == "__main__":
    main()
