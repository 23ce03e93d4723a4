"""A class-conditional run from shards to pictures: two tensor-parallel ranks learn which class has which colour."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from bitdance_scale.train.shared_index import labelled_index

ROOT = Path(__file__).parents[2]
COLOURS = ((220, 40, 40), (40, 180, 60), (50, 80, 220))
CONFIG = """
extends = "demo"
[run]
name = "colours"
steps = 40
[model]
preset = ""
family = "class_conditional"
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 4
head_dim = 16
ffn_size = 128
[head]
width = 64
num_blocks = 2
num_adaln = 1
head_dim = 16
[vision]
weights = "asset:demo_4x/ae.safetensors"
num_bits = 16
channels = 32
channel_mult = [1, 1, 2]
norm_groups = 32
[classes]
num_classes = 3
num_tokens = 4
grid = [8, 8]
[data]
captions = [{source = "cls"}]
global_batch = 12
max_pack_tokens = 512
pack_multiple = 16
image_to_text_share = 0.0
resolutions = [{side_px = 32, share = 1, buckets_px = [[32, 32]]}]
[optim]
lr = 4e-3
warmup_steps = 5
decay_steps = 0
[sample]
every_steps = 40
prompts = ["2", "0", "1"]
size_px = [32, 32]
num_steps = 16
guidance = 2.0
[evaluate]
shards = []
benchmarks = []
"""


def _write_shard(path: Path, labels: list[str | None]) -> None:
    numbers = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            colour = np.clip(numbers.normal(COLOURS[index % 3], 6), 0, 255).astype(np.uint8)
            image = io.BytesIO()
            Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(image, "PNG")
            members = {"png": image.getvalue()} | ({} if label is None else {"cls": label.encode()})
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "colours.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


PAIR = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@dataclass(frozen=True)
class Trained:
    """A run that has been trained, with the settings that name its data and its folder."""

    folder: Path
    config: str
    settings: list[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "colours.toml").write_text(CONFIG, encoding="utf-8")
    names = ("red", "green", "blue")
    _write_shard(folder / "0.tar", [names[index % 3] for index in range(48)])
    (folder / "names").write_text("red\ngreen\nblue\n")
    # A prompt is a name or a number.
    settings = [f"data.shards=['{folder}/0.tar']", f"run.root={folder}/runs"]
    settings += [f"classes.map={folder}/names", "sample.prompts=['blue', '0', 'green']"]
    found = Trained(folder, str(folder / "colours.toml"), settings)
    _python(folder, *PAIR, str(ROOT / "pipelines/imagenet.py"), found.config, *settings, "parallel.tensor=2")
    return found


def test_classes_are_drawn_in_their_colours(trained: Trained) -> None:
    run = trained.folder / "runs/colours"
    assert (run / "classes.txt").read_text() == "red\ngreen\nblue\n"
    losses = [metrics.loss_vision for metrics in read_metrics(run / METRICS_FILE)]
    assert losses[-1] < 0.5 * losses[0]
    # Three pictures side by side; the largest channel of each is that of its class.
    grid = np.asarray(Image.open(run / "samples/step_000040.png").convert("RGB"), dtype=float)
    thirds = np.array_split(grid[40:200], 3, axis=1)
    assert [int(part[:, 80:-80].mean(axis=(0, 1)).argmax()) for part in thirds] == [2, 0, 1]


def test_every_class_is_drawn_and_what_is_there_stays(trained: Trained) -> None:
    """Five images of each class in batches of four on two replicas, and then again those that are missing."""
    out = trained.folder / "drawn"
    options = [*_drawing(trained, out), "parallel.tensor=1"]
    _python(trained.folder, *PAIR, *DRAW, *options, "--images")
    images, labels = _read(out)
    assert images.shape == (15, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, [0, 1, 2] * 5)
    assert (images.mean(axis=(1, 2)).argmax(axis=1) == labels).mean() > 0.8
    np.testing.assert_array_equal(np.asarray(Image.open(out / "images/00002/0004.png")), images[14])
    assert sorted(path.name for path in out.iterdir()) == ["drawing.json", "grid.png", "images", "samples.npz"]
    record = json.loads((out / "drawing.json").read_text())
    wanted = {"steps": 16, "guidance": 2.0, "guidance_growth": "linear", "batch_size": 4}
    assert record["settings"].items() >= wanted.items() and record["size_px"] == [32, 32]

    # Stopped before the end: one image is black, one is missing; the batch of the missing one is drawn again.
    content = (out / "samples.npz").read_bytes()
    (out / "samples.npz").unlink()
    for row in set(range(15)) - {7}:
        part = out / f"parts/{row % 3:05d}/{row // 3:04d}.npy"
        part.parent.mkdir(parents=True, exist_ok=True)
        np.save(part, images[row] if row != 4 else np.zeros_like(images[4]))
    _python(trained.folder, *DRAW, *options, "--nproc=1")
    again, _ = _read(out)
    assert not again[4].any() and not (out / "parts").exists()
    again[4] = images[4]
    np.testing.assert_array_equal(again, images)
    assert len((out / "samples.npz").read_bytes()) == len(content)


@pytest.mark.large
def test_a_drawing_is_the_same_whoever_draws_it(trained: Trained) -> None:
    two, one = trained.folder / "two", trained.folder / "one"
    staged = ["parallel.tensor=1", "parallel.pipeline=2"]
    _python(trained.folder, *PAIR, *DRAW, *_drawing(trained, two), *staged)
    alone = [*DRAW, *_drawing(trained, one), "parallel.tensor=1", "--nproc=1"]
    _python(trained.folder, *alone)
    # Sums of other shapes may flip a bit that the head is not sure of.
    assert (_read(two)[0] == _read(one)[0]).mean() > 0.95
    refused = _python(trained.folder, *alone, "--seed=9", code=2)
    assert "one: holds another drawing (drawing.json): seed is 0 there, 9 here. Name another folder" in refused


DRAW = ["-m", "bitdance_scale.cli.evaluate_draw"]


def _drawing(trained: Trained, out: Path) -> list[str]:
    run = str(trained.folder / "runs/colours")
    return ["imagenet", run, f"--out={out}", "--images-per-prompt=5", "--batch-size=4", "--guidance-growth=linear"]


def _read(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, H, W, 3], their classes int64 [N])."""
    with np.load(out / "samples.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


@pytest.mark.large
def test_predictions_gather_at_the_bits(trained: Trained) -> None:
    """The histogram of the head's predictions of held-out images."""
    _write_shard(trained.folder / "held_out.tar", ["green", "blue", "red"] * 4)
    out = trained.folder / "histogram.png"
    options = [f"--out={out}", "--nproc=1", "--times=0.05,0.95", *trained.settings]
    held_out = [f"evaluate.shards=['{trained.folder}/held_out.tar']", "evaluate.images=12"]
    _python(trained.folder, "-m", "bitdance_scale.cli.histogram", trained.config, *options, *held_out)
    assert Image.open(out).format == "PNG"
    early, late = json.loads(out.with_suffix(".json").read_text())["times"]
    assert early["predictions"] == late["predictions"] == 12 * 64 * 16
    assert (early["time"], late["time"]) == (0.05, 0.95)
    assert late["near_share"] > early["near_share"] and late["near_share"] > 0.5


def _python(folder: Path, *arguments: str, code: int = 0) -> str:
    """Runs Python in a folder; what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["0", "1", "3"], "000002 of .*: '3'"),
        (["0", None, "2"], "000001 of .*: missing"),
        (["0", "cat", "2"], "000001 of .*: 'cat'"),
        (["-1", "1", ""], "000000 of .*: '-1'; 000002 of .*: empty"),
        (["0", "01", "2"], "000001 of .*: '01'"),
        (["0", "9" * 5000, "2"], "000001 of .*: '9{40}'"),
        (["a", "b", "c", "d"], "000000 of .*: 'a'; 000001 of .*: 'b'; 000002 of .*: 'c'; and 1 more"),
    ],
    ids=["above", "missing", "word", "two", "zero", "long", "many"],
)
def test_wrong_labels_are_refused_before_training(config_file, tmp_path, labels, found):
    _write_shard(tmp_path / "0.tar", labels)
    config = load_config(config_file, [f"data.shards=['{tmp_path}/0.tar']"])
    with pytest.raises(DataError, match=rf"of {len(labels)} samples have no usable label in 'cls': {found}.*0 to 2"):
        labelled_index(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classes.num_classes=0", r"classes\.num_classes = 0: .*draws from classes"),
        ("classes.grid=[4, 8]", r"buckets_px\[0\] = \[32, 32\]: must be \[16, 32\]"),
        ("sample.prompts=['cat']", r"sample\.prompts\[0\] = 'cat': must be the number of a class, 0 to 2"),
        ("data.image_to_text_share=0.1", "classes have no words"),
        ("data.max_pack_tokens=64", r"must be at least 67 = 64 cells .* - 1 \+ classes\.num_tokens = 4; use 80"),
        ("vision.block_side=3", "must be multiples of 12 px"),
        ("data.mode=stream", "labels are checked in an index"),
        ("model.head_dim=18", r"model\.head_dim = 18: must be a multiple of 4; use 16 or 20"),
        ("model.tie_embeddings=true", "there is no projection to tie"),
        ("model.family=text_to_image", r"classes\.num_classes = 3: .*has no classes"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_wrong_settings_are_refused(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config(config_file, [override]), 1)


def test_the_documented_configuration_is_legal(tmp_path):
    page = (ROOT / "docs/class_conditional.md").read_text(encoding="utf-8")
    path = tmp_path / "documented.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    config = load_config(path)
    check(config, 16)
    assert (config.classes.num_classes, config.optim.schedule, config.sample.guidance) == (102, "cosine", 3.9)
