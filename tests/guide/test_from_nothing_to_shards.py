"""The commands of docs/from_nothing_to_shards.md, as they stand there, against a web server on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from bitdance_scale.data.index.index import find_table, open_index
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.unit.data.shard_writing.small_sources import records_of, samples_of, skipped_of

pytestmark = [pytest.mark.guide, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "from_nothing_to_shards.md"
ENVIRONMENT = ROOT / ".venv-img2dataset"
BLOCK_TIMEOUT_S = 240
# Few pictures must fill several shards.
CHANGES = {"--number_sample_per_shard 5000": "--number_sample_per_shard 12"}
NUM_PHOTOS = 36
ROTATED_90 = 6


def guide_blocks() -> list[str]:
    """The blocks of the guide that are marked `bash`, in order, with `CHANGES`."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for old, new in CHANGES.items():
        assert any(old in block for block in blocks), f"the guide no longer says {old}"
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


def photo(width: int, height: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def web_pictures() -> dict[str, bytes]:
    """What the server has, by name."""
    exif = Image.Exif()
    exif[0x0112] = ROTATED_90
    photos = {
        f"photo{number}.jpg": encoded(photo(*((1300, 1100) if number % 2 else (600, 800)), number))
        for number in range(NUM_PHOTOS)
    }
    return photos | {
        "large_rotated.jpg": encoded(photo(1400, 1200, 100), exif=exif),
        "small_rotated.jpg": encoded(photo(640, 560, 101), exif=exif),
        "wide.png": encoded(photo(900, 700, 102), "PNG"),
        "cut.jpg": encoded(photo(700, 700, 103))[:4000],
        "page.jpg": b"<html>moved</html>",
        "tiny.jpg": encoded(photo(100, 100, 104)),
        "forbidden.jpg": encoded(photo(800, 800, 105)),
    }


@contextlib.contextmanager
def web_server(pictures: dict[str, bytes]) -> Iterator[str]:
    """A server of these pictures on this machine; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pictures.get(self.path.removeprefix("/"))
            self.send_response(404 if content is None else 200)
            if self.path == "/forbidden.jpg":
                self.send_header("X-Robots-Tag", "noai")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def write_metadata(folder: Path, names: list[str], address: str) -> None:
    """A list of addresses with LAION's columns; of the rows at its end none is wanted."""
    good = {"WIDTH": 800, "HEIGHT": 800, "punsafe": 0.1, "pwatermark": 0.2, "similarity": 0.3}
    rows = [good | {"URL": f"{address}/{name}", "TEXT": f"alt text of {name}"} for name in names]
    rows = [row | {"re_caption": f"a long caption of {name}"} for row, name in zip(rows, names, strict=True)]
    unwanted = [{"WIDTH": 500}, {"HEIGHT": 500}, {"punsafe": 0.9}, {"pwatermark": 0.9}, {"punsafe": None}]
    rows += [rows[0] | change for change in unwanted]
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part-00000.parquet")


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder, what each block printed) after all blocks of the guide."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / ".venv-img2dataset").symlink_to(ENVIRONMENT)
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    # The test may have pyarrow from elsewhere; img2dataset must use its own packages only.
    pictures = web_pictures()
    printed = []
    with web_server(pictures) as address:
        write_metadata(folder / "metadata", [*pictures, "gone.jpg"], address)
        for block in guide_blocks():
            own = environment | ({"PYTHONPATH": ""} if "bitdance" not in block else {})
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(
                command,
                cwd=folder,
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                timeout=BLOCK_TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}"
            printed.append(done.stdout)
    return folder, printed


def of_address(folder: Path) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """Name in the address -> (record, members) of all samples."""
    found = [(json.loads(members["json"]), members) for members in samples_of(folder).values()]
    return {record["url"].rpartition("/")[2]: (record, members) for record, members in found}


def test_rows_are_chosen(walk):
    num_rows = len(web_pictures()) + 1
    assert f"rows: {num_rows + 5} -> {num_rows}" in walk[1][0]


def test_what_cannot_be_had_is_counted(walk):
    stats = [json.loads(path.read_text(encoding="utf-8")) for path in (walk[0] / "shards").glob("*_stats.json")]
    assert sum(entry["count"] for entry in stats) == len(web_pictures()) + 1
    assert sum(entry["successes"] for entry in stats) == NUM_PHOTOS + 3
    causes = {cause for entry in stats for cause in entry["status_dict"]}
    assert causes == {
        "success",
        "Image decoding error",
        "image too small",
        "HTTP Error 404: Not Found",
        "Use of image disallowed by X-Robots-Tag directive",
    }


def test_images_are_as_the_guide_says(walk):
    samples = of_address(walk[0] / "shards") | of_address(walk[0] / "held_out")
    assert len(samples) == NUM_PHOTOS + 3
    record, members = samples["photo0.jpg"]
    assert (record["width"], record["height"]) == (600, 800)
    assert members["jpg"] == web_pictures()["photo0.jpg"], "not larger: the same bytes"
    assert (record["punsafe"], record["re_caption"]) == (0.1, "a long caption of photo0.jpg")
    record, members = samples["photo1.jpg"]
    assert (record["width"], record["height"]) == (1210, 1024), "the short side is 1024"
    record, members = samples["large_rotated.jpg"]
    stored = Image.open(io.BytesIO(members["jpg"]))
    assert stored.width > stored.height and 0x0112 not in stored.getexif(), "on its side"
    assert "Rotated 90 CW" in record["exif"]
    record, members = samples["small_rotated.jpg"]
    assert (record["width"], record["height"]) == (640, 560)
    assert Image.open(io.BytesIO(members["jpg"])).getexif()[0x0112] == ROTATED_90


def test_two_steps_were_trained(walk):
    folder, printed = walk
    metrics = read_metrics(folder / "runs" / "first_steps" / METRICS_FILE)
    assert [point.step for point in metrics] == [1, 2]
    assert (folder / "runs" / "first_steps" / "evaluation.jsonl").is_file()
    assert (folder / "sizes.png").is_file()
    assert any("punsafe" in text and "short_side_px" in text for text in printed)
    assert any("lost_rotation" in text for text in printed), "the index counts photos that lie on their side"


def test_originals_keep_their_orientation(walk):
    folder = walk[0]
    packed = of_address(folder / "originals_shards") | of_address(folder / "originals_shards" / "held_out")
    pictures = web_pictures()
    left_out = {"cut.jpg", "page.jpg", "forbidden.jpg"}
    assert packed.keys() == pictures.keys() - left_out
    record, members = packed["large_rotated.jpg"]
    assert (record["width"], record["height"]) == (1200, 1400)
    assert members["jpg"] == pictures["large_rotated.jpg"]
    assert packed["wide.png"][1]["png"] == pictures["wide.png"], "by its content, not by its name"
    assert record["punsafe"] == 0.1 and members["txt"] == b"alt text of large_rotated.jpg"
    assert sorted(skipped_of(folder / "originals_shards").values()) == ["bad_image", "unsupported_format"]
    shards = expand_shards([str(folder / "originals_shards")])
    table = find_table(folder / "originals_shards" / ".bitdance_index", shards)
    assert table is not None
    index = open_index(table.path)
    assert len(index) == len(records_of(folder / "originals_shards"))
